"""What drafts were sampled from is found beside them as it was, or not at all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.v2.sampled_from import (
    ARRAYS,
    CPU,
    DEPTH,
    MOST,
    SLOTS,
    VOCAB_SIZE,
    WIDTH,
    Q,
    put,
    read,
    sources,
)
from vllm_ssd.target.v2.device_sources import DeviceSources
from vllm_ssd.target.v2.device_trees import DeviceTrees
from vllm_ssd.target.v2.writer import TreeWriter
from vllm_ssd.wire.messages import Planted, Ready, Stepped
from vllm_ssd.wire.packing import pack, pack_floats


def test_what_a_token_was_sampled_from_is_found_with_it_alone() -> None:
    held = sources()
    assert read(held, [5, 1, 1]) == [{5: 1.0}, {1: 1.0}, {1: 1.0}]
    put(held, 5, Q)
    put(held, 9, Q, position=22)
    assert read(held, [5, 1, 9]) == [Q, {1: 1.0}, Q]
    assert read(held, [9, 1, 9])[0] == {9: 1.0}  # of the same distribution, but another was drawn
    assert read(held, [5, 1, 9], first=20 + WIDTH)[0] == {5: 1.0}
    assert read(held, [5, 1, 9], row=7)[0] == {5: 1.0}
    assert read(held, [5, 1, 9], drafted=2)[2] == {9: 1.0}


def test_what_is_forgotten_is_not_found() -> None:
    held = sources()
    put(held, 5, Q)
    held.forget([6])
    assert read(held, [5, 1, 1])[0] == {5: 1.0}


def test_a_certain_token_in_its_place_is_certain() -> None:
    held = sources()
    put(held, 5, Q)
    held.certain(np.array([6]), np.array([20], np.int32))
    assert read(held, [5, 1, 1])[0] == {5: 1.0}


@pytest.mark.parametrize("q", [{5: 0.5, 9: 0.25}, {9: 0.5, 2: 0.5}], ids=["sum", "not among them"])
def test_what_it_cannot_have_been_sampled_from_is_not_found(q: dict[int, float]) -> None:
    held = sources()
    put(held, 5, q)
    assert read(held, [5, 1, 1])[0] == {5: 1.0}


OTHER = {5: 0.75, 3: 0.25}


def at_two_moments(drafted: int, whole: bool) -> tuple[DeviceSources, DeviceSources]:
    """A row before it was used again and since then, or, if that is not ``whole``, meanwhile."""
    old, now = sources(), sources()
    put(old, 5, Q)
    put(now, 5, Q)
    with now.rewriting(np.array([6, -1, 10**6], np.int32)):
        now.forget([6])
        if not whole:
            return old, copied(now)
    put(now, drafted, OTHER)
    return old, now


def copied(of: DeviceSources) -> DeviceSources:
    copy = sources()
    for name in ARRAYS:
        getattr(copy, name).copy_(getattr(of, name))
    return copy


READS = [
    new
    for new in itertools.product([False, True], repeat=len(ARRAYS))
    if new[-1] or not any(new)  # the count of lives is read last
]
"""Which of the arrays are read once the row is used again."""


@pytest.mark.parametrize("new", READS)
@pytest.mark.parametrize("drafted", [5, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_what_was_read_while_a_row_is_used_again_is_certain(
    new: tuple[bool, ...], drafted: int, whole: bool
) -> None:
    old, now = at_two_moments(drafted, whole)
    mixed = sources()
    for name, is_new in zip(ARRAYS, new, strict=True):
        getattr(mixed, name).copy_(getattr(now if is_new else old, name))
    assert read(mixed, [5, 1, 1], life=0)[0] == ({5: 1.0} if any(new) else Q)


def test_the_row_is_sampled_from_again_once_it_has_begun_anew() -> None:
    _, now = at_two_moments(5, whole=True)
    assert read(now, [5, 1, 1], life=2)[0] == OTHER
    _, now = at_two_moments(5, whole=False)
    put(now, 5, OTHER)
    assert read(now, [5, 1, 1], life=1)[0] == {5: 1.0}


@given(seed=st.integers(0, 2**32 - 1))
def test_no_content_of_the_arrays_breaks_it(seed: int) -> None:
    held = sources()
    random = np.random.default_rng(seed)
    for name in ARRAYS:
        content = getattr(held, name).numpy().view(np.uint8)
        content[:] = random.integers(0, 256, content.shape, np.uint8)
    row = int(random.integers(-(2**31), 2**31))
    assert read(held, [5, 1, 2], row=row) == [{5: 1.0}, {1: 1.0}, {2: 1.0}]


def test_the_writer_puts_it_beside_the_tokens_that_the_draft_publishes() -> None:
    trees = DeviceTrees(SLOTS, DEPTH, VOCAB_SIZE, CPU, MOST)
    writer = TreeWriter(trees)
    writer.start(Ready(8, 100, 16))
    writer.announce(0)
    writer.assign(0, 1)
    one, none = pack([0]), pack([])
    writer.plant(
        Planted(one, pack([20]), pack([6]), pack([1]), one, pack([7]), pack_floats(np.ones(1, "f")))
    )
    q_tokens = pack(list(Q))
    q = pack_floats(np.array(list(Q.values()), np.float32))
    chances = pack_floats(np.full(1, 0.5, np.float32))
    certainly = Stepped(pack([6]), pack([4]), none, chances)
    by_chance = Stepped(pack([6]), pack([9]), none, chances, one, pack([3]), q_tokens, q)
    writer.steps([certainly, by_chance])
    assert trees.host_tokens[6, :3].tolist() == [7, 4, 9]
    assert trees.sources is not None
    assert read(trees.sources, [7, 4, 9]) == [{7: 1.0}, {4: 1.0}, Q]
    writer.plant(
        Planted(one, pack([30]), pack([6]), pack([0]), one, none, pack_floats(np.ones(0, "f")))
    )
    assert read(trees.sources, [7, 4, 9])[2] == Q  # the row is still the tree's own
    writer.drop(0)
    writer.announce(1)
    writer.plant(
        Planted(
            pack([1]), pack([20]), pack([6]), pack([0]), one, none, pack_floats(np.ones(0, "f"))
        )
    )
    assert read(trees.sources, [7, 4, 9])[2] == {9: 1.0}
