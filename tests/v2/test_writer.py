"""What the draft publishes is what the device finds, request by request."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.v2.messages import look_up_one
from vllm_ssd.core.tree import Where
from vllm_ssd.target.v2.device_trees import NOTHING, DeviceTrees
from vllm_ssd.target.v2.look_up import WHERE
from vllm_ssd.target.v2.writer import TreeWriter
from vllm_ssd.wire.messages import Forked, Planted, Pruned, Ready, Stepped, ToTarget
from vllm_ssd.wire.packing import pack, pack_floats

DEPTH, VOCAB_SIZE, SLOTS, BASE = 2, 50, 3, 4
HANDLE, SLOT, TRUNK, FORK, LATER = 7, 2, 3, 5, 6


class Published:
    """Trunk ``1 2 3`` after four tokens, and forks ``1 5 6 8`` and ``1 2 3 9``."""

    def __init__(self) -> None:
        self.trees = DeviceTrees(SLOTS, DEPTH, VOCAB_SIZE, torch.device("cpu"))
        self.writer = TreeWriter(self.trees)
        self.writer.start(Ready(16, 100, 16))
        self.announce(HANDLE, SLOT)
        self.plant(HANDLE, TRUNK, [1, 2, 3])
        self.fork(HANDLE, [1, 3], [5, 9], [FORK, LATER])
        self.step([FORK], [6])
        self.step([FORK], [8])

    def announce(self, handle: int, slot: int) -> None:
        self.writer.announce(handle)
        self.writer.assign(handle, slot)

    def plant(self, handle: int, trunk: int, tokens: list[int], ended: bool = False) -> None:
        tree = pack([handle]), pack([BASE]), pack([trunk]), pack([len(tokens)]), pack([ended])
        self.writer.plant(Planted(*tree, pack(tokens), _chances(tokens)))

    def fork(
        self, handle: int, k: list[int], tokens: list[int], rows: list[int], complete: bool = False
    ) -> None:
        heads = pack([handle]), pack([len(rows)]), pack([complete])
        self.writer.fork(Forked(*heads, pack(k), pack(tokens), pack(rows)))

    def step(self, rows: list[int], tokens: list[int], ended: bool = False) -> None:
        ends = pack(rows if ended else [])
        self.writer.steps([Stepped(pack(rows), pack(tokens), ends, _chances(tokens))])

    def find(self, *new: int, slot: int = SLOT, sampled: int = 1) -> tuple[list[int], int, Where]:
        """The drafts after these new tokens, how many of them were found, and where."""
        found = look_up_one(self.trees, slot, [40, 41, 42, 43, *new], sampled)
        return found.drafts[0].tolist(), int(found.drafted), WHERE[int(found.where)]


def _chances(tokens: list[int]) -> bytes:
    return pack_floats(torch.full([len(tokens)], 0.5).numpy())


@pytest.fixture
def published() -> Published:
    return Published()


def test_text_along_the_trunk_finds_the_rest_of_it(published: Published) -> None:
    assert published.find() == ([1, 2], 2, Where.FOUND)
    assert published.find(1) == ([2, 3], 2, Where.FOUND)


def test_a_short_find_is_filled_up_with_the_last_token(published: Published) -> None:
    assert published.find(1, 2) == ([3, 2], 1, Where.FOUND)
    assert published.find(1, 2, 3) == ([3, 3], 0, Where.FOUND)


def test_a_hit_returns_the_fork_that_came_true(published: Published) -> None:
    assert published.find(1, 5) == ([6, 8], 2, Where.FOUND)
    assert published.find(1, 5, 6) == ([8, 6], 1, Where.FOUND)
    assert published.find(1, 2, 3, 9) == ([9, 9], 0, Where.FOUND)
    published.step([LATER], [4])
    assert published.find(1, 2, 3, 9) == ([4, 9], 1, Where.FOUND)


def test_an_end_token_is_left_to_the_target(published: Published) -> None:
    published.step([TRUNK, FORK], [2, 2], ended=True)
    assert published.find(1, 2) == ([3, 2], 1, Where.FOUND)
    assert published.find(1, 5, 6) == ([8, 6], 1, Where.FOUND)
    assert published.find(1, 5, 6, 8) == ([8, 8], 0, Where.FOUND)


def test_an_outcome_that_was_not_guessed_is_pending_until_all_are(published: Published) -> None:
    assert published.find(1, 7) == ([7, 7], 0, Where.PENDING)
    published.fork(HANDLE, [], [], [], complete=True)
    assert published.find(1, 7) == ([7, 7], 0, Where.OFF)


def test_text_beyond_all_that_a_tree_can_hold_is_no_hit(published: Published) -> None:
    assert published.find(1, 5, 6, 8, *range(10, 25))[1:] == (0, Where.PENDING)


def test_a_prompt_that_is_being_computed_is_not_looked_up(published: Published) -> None:
    assert published.find(sampled=0) == ([43, 43], 0, Where.UNKNOWN)


def test_a_slot_without_a_tree_finds_nothing(published: Published) -> None:
    assert published.find(1, slot=0) == ([1, 1], 0, Where.UNKNOWN)


def test_a_pruned_fork_is_not_found(published: Published) -> None:
    published.writer.prune(Pruned(pack([HANDLE]), pack([1]), pack([FORK])))
    assert published.find(1, 5)[1:] == (0, Where.PENDING)
    assert published.find(1, 2, 3, 9)[2] is Where.FOUND


def test_the_next_tree_has_none_of_the_forks_of_the_last(published: Published) -> None:
    published.plant(HANDLE, FORK, [1, 2])
    assert published.find(1, 5)[1:] == (0, Where.PENDING)
    assert (published.trees.host_forks == NOTHING).all()


def test_who_takes_a_slot_does_not_find_the_tree_of_who_left_it(published: Published) -> None:
    published.writer.drop(HANDLE)
    published.announce(HANDLE + 1, SLOT)
    assert published.find(1)[1:] == (0, Where.UNKNOWN)
    published.plant(HANDLE, TRUNK, [1, 2, 3])  # it was on its way
    published.fork(HANDLE, [1], [5], [FORK])
    assert published.find(1)[1:] == (0, Where.UNKNOWN)
    published.plant(HANDLE + 1, TRUNK, [1, 4])
    assert published.find(1) == ([4, 1], 1, Where.FOUND)
    assert published.find(1, 5)[1] == 0


def test_two_slots_have_a_fork_of_the_same_outcome_each(published: Published) -> None:
    published.announce(HANDLE + 1, 0)
    published.plant(HANDLE + 1, 8, [1, 2])
    published.fork(HANDLE + 1, [1], [5], [9])
    published.step([9], [20])
    assert published.find(1, 5, slot=0) == ([20, 5], 1, Where.FOUND)
    assert published.find(1, 5) == ([6, 8], 2, Where.FOUND)


def test_a_new_draft_and_a_new_epoch_begin_with_nothing(published: Published) -> None:
    published.writer.clear()
    assert published.find(1)[1:] == (0, Where.UNKNOWN)
    again = Published()
    again.writer.start(Ready(16, 100, 16))
    assert again.find(1)[1:] == (0, Where.UNKNOWN)


@pytest.mark.parametrize("k", [-1, 2 * DEPTH + 3])
def test_a_fork_where_there_is_no_trunk_is_refused(published: Published, k: int) -> None:
    with pytest.raises(ValueError, match="where there is none"):
        published.fork(HANDLE, [k], [5], [FORK])


NUMBERS = st.one_of(st.integers(-2, 20), st.sampled_from([HANDLE, 2**31 - 1, -(2**31)]))
PACKED = st.one_of(st.lists(NUMBERS, max_size=3).map(pack), st.binary(max_size=9))
GARBAGE = st.one_of(
    st.builds(Planted, PACKED, PACKED, PACKED, PACKED, PACKED, PACKED, PACKED),
    st.builds(Forked, PACKED, PACKED, PACKED, PACKED, PACKED, PACKED),
    st.builds(Pruned, PACKED, PACKED, PACKED),
    st.builds(Stepped, PACKED, PACKED, PACKED, PACKED),
)


@given(messages=st.lists(GARBAGE, max_size=5))
def test_garbage_is_refused_or_harmless(messages: list[ToTarget]) -> None:
    published = Published()
    for message in messages:
        # These are the errors after which the client begins a new epoch.
        with suppress(ValueError, IndexError, KeyError, OverflowError):
            match message:
                case Planted():
                    published.writer.plant(message)
                case Forked():
                    published.writer.fork(message)
                case Pruned():
                    published.writer.prune(message)
                case Stepped():
                    published.writer.steps([message])
        drafts, drafted, _ = published.find(1, 5)
        assert 0 <= drafted <= DEPTH
        assert all(0 <= token < VOCAB_SIZE for token in drafts)
    published.writer.clear()
    assert published.find(1, 5)[1:] == (0, Where.UNKNOWN)


def test_rows_that_the_draft_does_not_have_are_refused(published: Published) -> None:
    with pytest.raises(IndexError):
        published.fork(HANDLE, [1], [5], [16])
    with pytest.raises(IndexError):
        published.step([16], [5])
