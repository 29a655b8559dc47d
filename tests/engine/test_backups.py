"""Greedy output is token-identical whatever is proposed where a look-up finds nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.harness import LONG_WAIT_MS, Job, Pair, Spec, greedy, prompt, staggered

LENGTHS = (70, 9, 200, 33, 65, 130, 18, 97, 5, 48, 160, 21, 80, 11, 38, 64)
REPEATING = [1, *(prompt(9, salt=3)[1:] * 12)]
"""A text in which n-grams are found."""


def check(
    start_pair: Callable[[Spec], Pair], draft: str = "near", engine: Any = None, **options: Any
) -> dict[str, float]:
    """Sixteen requests at once, and some that repeat themselves; the growth of the counters."""
    pair = start_pair(Spec(draft, 4, {"branches": 3, **options}, engine or {}))
    ends = {"ignore_eos": False, "stop_token_ids": list(range(100, 140))}
    jobs = [
        *staggered(LENGTHS, every=1, params=greedy(40)),
        *(Job(REPEATING[: 60 + n], greedy(40), arrives=12 * n) for n in range(4)),
        *(Job(prompt(8 + n, n), greedy(40, **ends), arrives=9 * n) for n in range(4)),
    ]
    return pair.check_identical(jobs)


@pytest.mark.parametrize("draft", ["near", pytest.param("random", marks=pytest.mark.slow)])
def test_waiting_for_the_draft(start_pair: Callable[[Spec], Pair], draft: str) -> None:
    stats = check(start_pair, draft, backup="draft", max_wait_ms=LONG_WAIT_MS)
    assert stats["waits"] > 5  # one for the whole batch
    assert stats["waits_in_vain"] == 0
    assert stats["waited_tokens"] > 3 * stats["waits"]
    assert stats["ngram_tokens"] == 0
    # Requests can use more tokens after their misses, but for the last one of a text.
    assert stats["waited_tokens"] > 0.5 * (stats["look_ups"] - stats["hits"])
    if draft == "near":
        assert stats["waited_accepted"] > 0.2 * stats["waited_tokens"]


def test_ngrams_of_the_text(start_pair: Callable[[Spec], Pair]) -> None:
    stats = check(start_pair, backup="ngram", fan_out=1)
    assert stats["waits"] == 0
    assert stats["ngram_proposals"] > 0
    assert 0 < stats["ngram_accepted"] < stats["ngram_tokens"]


@pytest.mark.slow
def test_what_pays(start_pair: Callable[[Spec], Pair]) -> None:
    stats = check(start_pair, fan_out=1)
    assert stats["waits"] > 0
    assert stats["ngram_proposals"] > 0


@pytest.mark.slow
def test_nothing(start_pair: Callable[[Spec], Pair]) -> None:
    stats = check(start_pair, backup="none")
    assert stats["waits"] == stats["ngram_proposals"] == 0


@pytest.mark.slow
def test_a_bound_holds_what_pays(start_pair: Callable[[Spec], Pair]) -> None:
    stats = check(start_pair, backup="draft", max_wait_ms=1.0, draft="itself")
    assert stats["waits"] > 0
    assert stats["wait_seconds"] < 0.05 * stats["waits"]
