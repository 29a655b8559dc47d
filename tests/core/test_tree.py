"""Look-up by content in the speculation cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.core import tree as tree_module
from vllm_ssd.core.arrays import Float32Array, Int32Array
from vllm_ssd.core.tree import SpeculationCache, Where

HANDLE, BASE = 7, 10
TRUNK, FORK, LATE_FORK = 0, 1, 2


def ints(*values: int) -> Int32Array:
    return np.array(values, np.int32)


def floats(*values: float) -> Float32Array:
    return np.array(values, np.float32)


def chances_of(*tokens: int) -> Float32Array:
    """A chance for each token that tells which token it is."""
    return floats(*(token / 64 for token in tokens))


@pytest.fixture
def cache() -> SpeculationCache:
    """Trunk ``1 2 3``; forks ``1 5 6`` (two tokens of its own) and ``1 2 3 9``, not complete."""
    cache = SpeculationCache(max_rows=6, width=8)
    cache.plant(HANDLE, BASE, TRUNK, ints(1, 2, 3), floats(0.1, 0.2, 0.3), ended=False)
    cache.add_forks([HANDLE], [2], ints(1, 3), ints(5, 9), ints(FORK, LATE_FORK))
    cache.append(ints(FORK), ints(6), floats(0.6))
    return cache


def draft_after(cache: SpeculationCache, *text: int, limit: int = 8) -> list[int]:
    (below,) = cache.look_up([HANDLE], [list(text)])
    assert below.where is Where.FOUND
    return below.drafted[:limit]


def where(cache: SpeculationCache, *text: int) -> Where:
    return cache.walk(HANDLE, list(text)).where


def test_text_along_the_trunk_finds_the_rest_of_the_trunk(cache: SpeculationCache) -> None:
    assert draft_after(cache) == [1, 2, 3]
    assert draft_after(cache, 1) == [2, 3]
    assert draft_after(cache, 1, 2, 3) == []


def test_text_that_leaves_the_trunk_at_a_fork_finds_the_fork(cache: SpeculationCache) -> None:
    assert draft_after(cache, 1, 5) == [6]
    assert draft_after(cache, 1, 5, 6) == []
    assert draft_after(cache, 1, 2, 3, 9) == []


def test_a_partly_drafted_fork_is_a_shorter_draft(cache: SpeculationCache) -> None:
    cache.append(ints(LATE_FORK), ints(4), floats(0.4))
    assert draft_after(cache, 1, 2, 3, 9) == [4]
    cache.append(ints(FORK, LATE_FORK), ints(8, 3), floats(0.8, 0.3))
    assert draft_after(cache, 1, 2, 3, 9) == [4, 3]
    assert draft_after(cache, 1, 5) == [6, 8]


def test_no_more_than_the_limit_is_returned(cache: SpeculationCache) -> None:
    assert draft_after(cache, limit=2) == [1, 2]
    assert draft_after(cache, 1, 5, limit=0) == []


def test_a_fork_holds_only_after_its_own_k(cache: SpeculationCache) -> None:
    cache.trees[HANDLE].complete = True
    assert where(cache, 5) is Where.OFF
    assert where(cache, 1, 2, 5) is Where.OFF


def test_unguessed_text_is_pending_until_all_forks_are_made(cache: SpeculationCache) -> None:
    assert where(cache, 1, 7) is Where.PENDING
    cache.trees[HANDLE].complete = True
    assert where(cache, 1, 7) is Where.OFF


def test_text_past_the_end_of_a_growing_trunk_is_pending(cache: SpeculationCache) -> None:
    cache.trees[HANDLE].complete = True
    assert where(cache, 1, 2, 3, 8) is Where.PENDING
    cache.ended[TRUNK] = True
    assert where(cache, 1, 2, 3, 8) is Where.OFF


def test_text_past_the_end_of_a_growing_fork_is_pending(cache: SpeculationCache) -> None:
    assert where(cache, 1, 5, 6, 4) is Where.PENDING
    assert where(cache, 1, 5, 7) is Where.OFF
    cache.ended[FORK] = True
    assert where(cache, 1, 5, 6, 4) is Where.OFF


def test_a_walk_off_the_tree_returns_how_much_of_the_trunk_matched(cache: SpeculationCache) -> None:
    walk = cache.walk(HANDLE, [1, 2, 8])
    assert (walk.row, walk.offset) == (TRUNK, 2)
    # Also where a fork matched some more: only the trunk's KV can be kept.
    walk = cache.walk(HANDLE, [1, 5, 8])
    assert (walk.row, walk.offset) == (TRUNK, 1)


def test_a_request_without_a_tree_is_unknown(cache: SpeculationCache) -> None:
    assert cache.walk(HANDLE + 1, [1]).where is Where.UNKNOWN
    cache.clear()
    assert where(cache, 1) is Where.UNKNOWN


def test_planting_anew_replaces_the_tree_and_its_forks(cache: SpeculationCache) -> None:
    cache.plant(HANDLE, BASE + 2, FORK, ints(6), floats(0.6), ended=False)
    tree = cache.trees[HANDLE]
    assert (tree.base, tree.trunk, tree.complete, tree.forks) == (BASE + 2, FORK, False, [])
    assert draft_after(cache) == [6]
    assert where(cache, 5) is Where.PENDING


def test_a_reused_row_keeps_nothing_of_its_former_fork(cache: SpeculationCache) -> None:
    cache.ended[FORK] = True
    cache.plant(HANDLE + 1, 3, 4, ints(2), floats(0.2), ended=False)
    cache.add_forks([HANDLE + 1], [1], ints(0), ints(8), ints(FORK))
    assert cache.row_tokens(FORK) == [8]
    assert not cache.ended[FORK]


def test_large_token_ids_and_every_k_have_keys_of_their_own() -> None:
    cache = SpeculationCache(max_rows=4, width=4)
    largest = 2**31 - 1
    cache.plant(HANDLE, 0, 0, ints(1, 2), floats(0.1, 0.2), ended=False)
    cache.add_forks([HANDLE], [3], ints(0, 1, 1), ints(largest, largest, 0), ints(1, 2, 3))
    tree = cache.trees[HANDLE]
    assert [tree.fork_at(0, largest), tree.fork_at(1, largest), tree.fork_at(1, 0)] == [1, 2, 3]
    assert tree.fork_at(0, 0) == -1


tokens = st.integers(0, 3)


class Grown(NamedTuple):
    """A request's tree as it may have grown."""

    trunk: list[int]
    forks: dict[tuple[int, int], list[int]]
    ended: set[int]
    """Indices of rows that have ended, in the order in which they were made, the trunk first."""
    pruned: set[int]
    complete: bool
    text: list[int]
    """What is looked up."""


grown = st.builds(
    Grown,
    st.lists(tokens, max_size=5),
    st.dictionaries(st.tuples(st.integers(0, 5), tokens), st.lists(tokens, max_size=3), max_size=5),
    st.sets(st.integers(0, 5)),
    st.sets(st.integers(1, 5), max_size=2),
    st.booleans(),
    st.lists(tokens, max_size=9),
)


def cache_of(trees: list[Grown | None]) -> SpeculationCache:
    """The trees of requests 0, 1, ..., planted one by one; None for a request without one."""
    cache = SpeculationCache(max_rows=6 * len(trees) + 1, width=8)
    for handle, tree in enumerate(trees):
        if tree is None:
            continue
        first = 6 * handle
        chances = chances_of(*tree.trunk)
        cache.plant(handle, BASE, first, ints(*tree.trunk), chances, ended=0 in tree.ended)
        for row, ((k, token), rest) in enumerate(tree.forks.items(), start=1):
            cache.add_forks([handle], [1], ints(k), ints(token), ints(first + row))
            for later in rest:
                cache.append(ints(first + row), ints(later), chances_of(later))
            cache.ended[first + row] = row in tree.ended
        rows = ints(*(first + row for row in tree.pruned))
        cache.prune([handle], [len(rows)], rows)
        cache.trees[handle].complete = tree.complete
    return cache


@given(st.lists(st.none() | grown, max_size=7))
def test_looking_many_up_at_once_finds_what_each_walk_finds(trees: list[Grown | None]) -> None:
    cache = cache_of(trees)
    texts = [[1] if tree is None else tree.text for tree in trees]
    found = cache.look_up_many(list(range(len(trees))), texts)
    assert found == cache.look_up(list(range(len(trees))), texts)
    assert len(found) == len(trees)
    for handle, (text, below) in enumerate(zip(texts, found, strict=True)):
        walk = cache.walk(handle, text)
        assert (below.where, below.row) == (walk.where, walk.row)
        if walk.where is Where.FOUND:
            assert below.drafted == cache.row_tokens(walk.row)[walk.offset :]
            assert below.ended == cache.ended[walk.row]
            assert below.chances == [token / 64 for token in below.drafted]


@given(st.lists(grown, max_size=7))
def test_trees_planted_together_are_those_planted_one_by_one(trees: list[Grown]) -> None:
    one_by_one, together = (SpeculationCache(max_rows=8, width=8) for _ in range(2))
    for row, tree in enumerate(trees):
        chances = chances_of(*tree.trunk)
        one_by_one.plant(row, BASE + row, row, ints(*tree.trunk), chances, 0 in tree.ended)
    tokens = [token for tree in trees for token in tree.trunk]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_module, "_MANY_PLANTED", 1)
        together.plant_all(
            list(range(len(trees))),
            [BASE + row for row in range(len(trees))],
            list(range(len(trees))),
            [len(tree.trunk) for tree in trees],
            ints(*tokens),
            chances_of(*tokens),
            [int(0 in tree.ended) for tree in trees],
        )
    assert together.trees == one_by_one.trees
    for name in ("tokens", "chance", "length", "start", "ended"):
        assert np.array_equal(getattr(together, name), getattr(one_by_one, name))


@given(
    trunk=st.lists(tokens, max_size=5),
    forks=st.dictionaries(
        st.tuples(st.integers(0, 5), tokens), st.lists(tokens, max_size=3), max_size=8
    ),
    text=st.lists(tokens, max_size=9),
)
def test_a_walk_finds_exactly_the_texts_that_are_paths_of_the_tree(
    trunk: list[int], forks: dict[tuple[int, int], list[int]], text: list[int]
) -> None:
    # As the draft makes them: off a trunk token that is known, and never that very token.
    forks = {
        (k, first): rest
        for (k, first), rest in forks.items()
        if k <= len(trunk) and (k == len(trunk) or trunk[k] != first)
    }
    cache = SpeculationCache(max_rows=10, width=8)
    cache.plant(HANDLE, BASE, 0, ints(*trunk), chances_of(*trunk), ended=True)
    for row, ((k, first), rest) in enumerate(forks.items(), start=1):
        cache.add_forks([HANDLE], [1], ints(k), ints(first), ints(row))
        for token in rest:
            cache.append(ints(row), ints(token), chances_of(token))
        cache.ended[row] = True
    cache.trees[HANDLE].complete = True

    paths = [trunk, *([*trunk[:k], first, *rest] for (k, first), rest in forks.items())]
    matching = [path for path in paths if path[: len(text)] == text]
    walk = cache.walk(HANDLE, text)
    if matching:
        assert walk.where is Where.FOUND
        (below,) = cache.look_up([HANDLE], [text])
        assert below.drafted in [path[len(text) :] for path in matching]
        assert below.ended
    else:
        assert walk.where is Where.OFF
