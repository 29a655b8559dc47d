"""What of a look-up's result is proposed, and how it is counted."""

from __future__ import annotations

import pytest

from vllm_ssd.core.stats import Stats
from vllm_ssd.core.tree import Below, Where
from vllm_ssd.target.lookup import LookUp, answer
from vllm_ssd.target.requests import Tracked


def below(where: Where, row: int, drafted: list[int], ended: bool) -> Below:
    """A walk's end; the chances are those of a fair coin."""
    return Below(where, row, drafted, ended, [0.5] * len(drafted))


def answered(found: Below, wanted: int = 4, ends: frozenset[int] = frozenset()) -> LookUp:
    """One look-up after its answer."""
    each = LookUp(0, Tracked(7, 10, 100, ends=ends), [5], 11, wanted, found)
    answer([each], Stats())
    return each


@pytest.mark.parametrize("wanted", [0, 1, 3, 9])
def test_no_more_is_proposed_than_can_be_used(wanted: int) -> None:
    found = below(Where.FOUND, 0, [1, 2, 3], False)
    assert answered(found, wanted).request.proposed == [1, 2, 3][:wanted]


@pytest.mark.parametrize("drafted", [[], [6], [6, 7]])
def test_an_end_token_is_left_to_the_target(drafted: list[int]) -> None:
    assert answered(below(Where.FOUND, 0, drafted, True)).request.proposed == drafted[:-1]


def test_a_branch_cut_before_its_end_token_is_proposed_whole() -> None:
    assert answered(below(Where.FOUND, 0, [6, 7, 8], True), wanted=2).request.proposed == [6, 7]


def test_an_end_token_that_the_draft_does_not_know_ends_the_proposal() -> None:
    found = below(Where.FOUND, 0, [6, 7, 8], False)
    assert answered(found, ends=frozenset([7])).request.proposed == [6]


def test_finding_that_the_text_ends_is_a_hit() -> None:
    stats = Stats()
    each = LookUp(0, Tracked(7, 10, 100), [5], 11, 4, below(Where.FOUND, 0, [6], True))
    answer([each], stats)
    assert each.request.proposed == []
    assert stats.hits == 1
    answer([LookUp(0, Tracked(8, 10, 100), [5], 11, 4, below(Where.OFF, 0, [], False))], stats)
    assert stats.misses_no_branch == 1
