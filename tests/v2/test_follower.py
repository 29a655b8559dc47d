"""The draft is told of every request and outcome, a step behind the device."""

from __future__ import annotations

import pytest

from tests.v2.following import DEPTH, EOS, MAX_LENGTH, SLOTS, Following, request, row
from vllm_ssd.target.v2.device_trees import NOTHING
from vllm_ssd.target.v2.outcomes import Row
from vllm_ssd.target.v2.slots import Begun
from vllm_ssd.wire.messages import Finished, Start, Trimmed, Verified
from vllm_ssd.wire.packing import unpack_list


def test_a_tree_that_the_draft_plants_is_found_in_the_slot(following: Following) -> None:
    start = following.begin(7, 2, [1, 5, 6])
    assert unpack_list(start.tokens) == [1, 5, 6]
    following.plant(start.handle, 3, [8, 9, 4])
    assert following.found(2, [1, 5, 6, 8]) == [9, 4]
    assert following.found(1, [1, 5, 6, 8]) == []


def test_outcomes_are_told_with_what_is_proposed(following: Following) -> None:
    handle = following.begin(7, 2, [1, 5, 6]).handle
    (verified,) = following.verify(row(7, [8], [9, 4]))
    assert isinstance(verified, Verified)
    assert unpack_list(verified.handles) == [handle]
    assert unpack_list(verified.lengths) == [3]
    assert unpack_list(verified.tokens) == [8, 9, 4]
    (verified,) = following.verify(row(7, [9, 11]))
    assert unpack_list(verified.lengths) == [4]
    assert unpack_list(verified.confirmed_counts) == [2]
    assert unpack_list(verified.proposed_counts) == [0]
    assert following.stats.tokens_drafted == 2
    assert following.stats.tokens_accepted == 1
    assert (following.stats.hits, following.stats.misses_no_branch) == (1, 1)


def test_a_proposal_that_the_scheduler_has_cut_is_told(following: Following) -> None:
    handle = following.begin(7, 2, [1, 5, 6]).handle
    following.begin(8, 1, [1, 5, 6])
    following.verify(row(7, [8], [9, 4]), row(8, [8], [9]))
    following.follower.trimmed([(7, 1), (8, 2), (5, 0)])
    (trimmed,) = following.draft.hears(0.1)
    assert isinstance(trimmed, Trimmed)
    assert unpack_list(trimmed.handles) == [handle]
    assert unpack_list(trimmed.verified_counts) == [1]
    following.verify(row(7, [9, 3])._replace(verified=1))
    assert following.stats.tokens_drafted == following.stats.tokens_accepted == 1


def test_a_step_with_a_prompt_is_no_usual_verification(following: Following) -> None:
    def told(*rows: Row) -> bool:
        (verified,) = following.verify(*rows)
        assert isinstance(verified, Verified)
        return verified.verify_us > 0

    following.begin(7, 2, [1, 5, 6])
    assert not told(row(7, [8]))  # its own prompt
    assert told(row(7, [9]))
    following.begin(8, 1, [1, 5])
    assert not told(row(7, [9]), row(8, []))
    assert not told(row(7, [9]), row(8, [4]))
    assert told(row(7, [9]), row(8, [4]))


def test_a_prompt_that_is_being_computed_has_no_outcome(following: Following) -> None:
    following.begin(7, 2, [1, 5, 6])
    assert following.verify(row(7, [])) == []
    assert following.stats.look_ups == 0


@pytest.mark.parametrize("last", [[EOS, 77], list(range(20, 40))], ids=["end", "length"])
def test_nothing_is_told_of_a_request_that_has_ended(following: Following, last: list[int]) -> None:
    following.begin(7, 2, [1, 5, 6])
    assert following.verify(row(7, last, [9])) == []
    assert following.verify(row(7, [12], [9])) == []


def test_a_request_that_has_gone_is_forgotten_and_so_is_its_tree(following: Following) -> None:
    handle = following.begin(7, 2, [1, 5, 6]).handle
    following.plant(handle, 3, [8, 9, 4])
    following.follower.scheduled([7], [])
    (finished,) = following.draft.hears()
    assert isinstance(finished, Finished)
    assert unpack_list(finished.handles) == [handle]
    assert following.found(2, [1, 5, 6, 8]) == []
    following.plant(handle, 3, [8, 9, 4])  # it was on its way
    assert following.trees.host_roots.tolist() == [NOTHING] * SLOTS
    assert following.verify(row(7, [8])) == []


def test_a_preempted_request_is_announced_with_its_whole_text(following: Following) -> None:
    following.begin(7, 2, [1, 5, 6])
    following.verify(row(7, [8]))
    following.follower.scheduled([7], [])
    following.draft.hears()
    new = request([1, 5, 6], text=[1, 5, 6, 8])
    following.follower.scheduled([], [Begun(8, 0, new)])
    (start,) = following.draft.hears()
    assert isinstance(start, Start)
    assert unpack_list(start.tokens) == [1, 5, 6, 8]
    assert start.limit == 3 + 20 - 1


def test_in_a_new_epoch_running_requests_are_announced_again(following: Following) -> None:
    handle = following.begin(7, 2, [1, 5, 6]).handle
    following.verify(row(7, [8]))
    following.client.resync("a test")
    (start,) = following.verify(row(7, [9, 10]))
    assert isinstance(start, Start)
    assert start.handle != handle
    assert unpack_list(start.tokens) == [1, 5, 6, 8, 9, 10]
    assert following.stats.misses_resync == 1
    following.plant(start.handle, 6, [4])
    assert following.found(2, [1, 5, 6, 8, 9, 10]) == [4]


def test_without_a_draft_the_texts_are_still_followed(following: Following) -> None:
    following.begin(7, 2, [1, 5, 6])
    following.draft.dies()
    following.client.poll(1.0)
    assert not following.client.up
    following.follower.verified([row(7, [8], length=4)])
    assert following.stats.misses_draft_down == 1
    assert following.stats.tokens_filled == DEPTH


def test_a_request_that_is_not_plain_text_is_left_alone_and_counted(following: Following) -> None:
    new = request([1, 5, 6])
    new.lora_request = object()
    following.follower.scheduled([], [Begun(7, 2, new)])
    assert following.verify(row(7, [8])) == []
    assert following.verify(row(7, [])) == []
    assert following.stats.misses_cannot_draft == 1
    assert following.stats.tokens_filled == DEPTH
    assert following.stats.look_ups == 0
    following.follower.scheduled([7], [])
    following.verify(row(7, [8]))
    assert following.stats.misses_cannot_draft == 1


def test_a_text_that_is_too_long_for_the_draft_is_counted(following: Following) -> None:
    following.begin(7, 2, [1] * (MAX_LENGTH - 2), tokens=20)
    following.verify(row(7, [8]))
    assert following.stats.misses_cannot_draft == 0
    following.verify(row(7, [8]))
    assert following.stats.misses_cannot_draft == 1
    assert following.stats.look_ups == 0


def test_what_only_fills_up_is_counted(following: Following) -> None:
    following.begin(7, 2, [1, 5, 6])
    following.verify(row(7, [8], [9]))
    assert following.stats.tokens_filled == DEPTH - 1


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_after_a_lost_outcome_a_request_is_not_followed_any_more(
    following: Following, up: bool
) -> None:
    handle = following.begin(7, 2, [1, 5, 6]).handle
    following.begin(8, 1, [1, 5, 6])
    following.plant(handle, 3, [8, 9, 4])
    if not up:
        following.draft.dies()
        following.client.poll(1.0)
    # An outcome with two tokens never came.
    following.follower.verified([row(7, [11], length=6), row(8, [9], length=4)])
    assert following.stats.texts_lost == 1
    assert following.found(2, [1, 5, 6, 8]) == []
    if up:
        finished, verified = following.draft.hears(0.1)
        assert isinstance(finished, Finished)
        assert isinstance(verified, Verified)
        assert unpack_list(finished.handles) == [handle]
        assert len(unpack_list(verified.handles)) == 1
        following.client.resync("a test")
    following.follower.verified([row(7, [12], length=7)])
    if up:
        assert following.draft.hears(0.1) == []
    assert following.stats.texts_lost == following.stats.misses_cannot_draft == 1
