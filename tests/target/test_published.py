"""The target's copy of the trees: messages for finished requests, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from vllm_ssd.core.tree import Where
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.wire.messages import MAX_ROWS, Forked, Planted, Pruned, Ready, Stepped
from vllm_ssd.wire.packing import pack, pack_floats

DEPTH, VOCAB_SIZE, ROWS, MOST = 2, 100, 8, 3
WIDTH = 2 * DEPTH + 2
HANDLE = 3


@pytest.fixture
def published() -> PublishedTrees:
    """One announced request, with trunk ``1 2`` in row 0."""
    trees = PublishedTrees(DEPTH, VOCAB_SIZE)
    trees.start(Ready(ROWS, 100, 16))
    trees.announce(HANDLE)
    trees.plant(planted(HANDLE, 0, [1, 2]))
    return trees


def planted(handle: int, trunk: int, tokens: Sequence[int], count: int | None = None) -> Planted:
    count = len(tokens) if count is None else count
    chances = pack_floats(np.full(len(tokens), 0.5, np.float32))
    tree = pack([handle]), pack([10]), pack([trunk]), pack([count]), pack([0])
    return Planted(*tree, pack(list(tokens)), chances)


def forked(
    handle: int, k: list[int], tokens: list[int], rows: list[int], complete: int = 0
) -> Forked:
    return Forked(
        pack([handle]), pack([len(rows)]), pack([complete]), pack(k), pack(tokens), pack(rows)
    )


def stepped(
    rows: list[int],
    tokens: list[int],
    ended: Sequence[int] = (),
    sampled: Mapping[int, Mapping[int, float]] | None = None,
) -> Stepped:
    """A step; ``sampled`` are the distributions of some of its tokens, by index."""
    chances = pack_floats(np.full(len(rows), 0.5, np.float32))
    step = Stepped(pack(rows), pack(tokens), pack(list(ended)), chances)
    if not sampled:
        return step
    entries = [entry for distribution in sampled.values() for entry in distribution.items()]
    return structs.replace(
        step,
        sampled=pack(list(sampled)),
        supports=pack([len(distribution) for distribution in sampled.values()]),
        q_tokens=pack([token for token, _ in entries]),
        q_probabilities=pack_floats(np.array([share for _, share in entries], np.float32)),
    )


def sampling(sampled_from: int = MOST) -> PublishedTrees:
    """One announced request, with an empty trunk in row 0, of a draft that samples."""
    trees = PublishedTrees(DEPTH, VOCAB_SIZE, sampled_from)
    trees.start(Ready(ROWS, 100, 16))
    trees.announce(HANDLE)
    trees.plant(planted(HANDLE, 0, []))
    return trees


def distributions_of(published: PublishedTrees, row: int, count: int) -> list[dict[int, float]]:
    """What the tokens of a row from position 10 on were sampled from; empty for certain ones."""
    assert published.distributions is not None
    drafted = published.cache.tokens[row, :count].astype(np.int64)
    supports, tokens, values = published.distributions_of(
        np.full(count, row), 10 + np.arange(count), drafted
    )
    ends = supports.cumsum().tolist()
    return [
        dict(zip(tokens[end - n : end].tolist(), values[end - n : end].tolist(), strict=True))
        for end, n in zip(ends, supports.tolist(), strict=True)
    ]


def test_what_is_published_is_found(published: PublishedTrees) -> None:
    published.fork(forked(HANDLE, [1], [7], [4], complete=1))
    published.steps([stepped([0, 4], [3, 8]), stepped([4], [9], ended=[4])])
    cache = published.cache
    trunk, fork = cache.look_up([HANDLE, HANDLE], [[1], [1, 7]])
    assert trunk.drafted == [2, 3]
    assert (fork.drafted, fork.ended) == ([8, 9], True)
    assert cache.trees[HANDLE].complete
    assert cache.ended[4]


def test_a_withdrawn_tree_is_gone_until_the_next_one_is_planted(published: PublishedTrees) -> None:
    published.plant(planted(HANDLE, -1, []))
    assert HANDLE not in published.cache.trees
    assert published.withdrawn == {HANDLE}
    published.plant(planted(HANDLE, 2, [5]))
    assert published.cache.row_tokens(published.cache.trees[HANDLE].trunk) == [5]
    assert published.withdrawn == set()


def test_a_pruned_fork_is_not_found(published: PublishedTrees) -> None:
    published.fork(forked(HANDLE, [0, 1], [7, 8], [4, 5], complete=1))
    published.prune(Pruned(pack([HANDLE]), pack([1]), pack([4])))
    cache = published.cache
    assert [below.where for below in cache.look_up([HANDLE] * 2, [[7], [1, 8]])] == [
        Where.OFF,
        Where.FOUND,
    ]


def test_many_trees_of_a_message_come_and_go_together(published: PublishedTrees) -> None:
    for handle in range(10, 16):
        published.announce(handle)
    handles, trunks = list(range(10, 17)), [0, 1, -1, 2, 3, -1, 4]  # 16 was never announced
    counts = [1, 2, 0, 0, 1, 0, 1]
    published.plant(
        Planted(
            pack(handles),
            pack([10] * 7),
            pack(trunks),
            pack(counts),
            pack([0, 1, 0, 0, 0, 0, 0]),
            pack([5, 6, 7, 8, 9]),
            pack_floats(np.array([0.5, 0.6, 0.7, 0.8, 0.9], np.float32)),
        )
    )
    cache = published.cache
    assert sorted(cache.trees) == [HANDLE, 10, 11, 13, 14]
    assert [cache.row_tokens(row) for row in range(5)] == [[5], [6, 7], [], [8], [9]]
    assert cache.ended.tolist()[:5] == [False, True, False, False, False]
    assert published.withdrawn == {12, 15}


def test_a_tree_on_its_way_for_a_finished_request_is_not_kept(published: PublishedTrees) -> None:
    published.drop(HANDLE)
    published.plant(planted(HANDLE, 0, [1]))
    published.plant(planted(HANDLE, -1, []))
    published.fork(forked(HANDLE, [0], [4], [1]))
    assert not published.cache.trees
    assert not published.withdrawn


def test_rows_of_a_finished_request_stay_in_step(published: PublishedTrees) -> None:
    # Rows 0 and 1 are full; the draft does not have the message yet that their request is finished.
    for row in (0, 1):
        published.plant(planted(HANDLE, row, [1] * WIDTH))
    published.drop(HANDLE)
    published.plant(planted(HANDLE, 0, [5]))
    published.fork(forked(HANDLE, [0], [4], [1]))
    published.steps([stepped([0, 1], [6, 7])])
    assert published.cache.row_tokens(0) == [5, 6]
    assert published.cache.row_tokens(1) == [4, 7]


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("start", Ready(0, 1, 1)),
        ("start", Ready(MAX_ROWS + 1, 1, 1)),
        ("steps", stepped([ROWS], [1])),
        ("steps", stepped([-1], [1])),
        ("steps", stepped([0], [VOCAB_SIZE])),
        ("steps", stepped([0], [-1])),
        ("steps", stepped([0, 1], [1])),
        ("steps", stepped([0], [1], ended=[ROWS])),
        ("steps", Stepped(b"123", b"", b"", b"")),
        ("plant", planted(HANDLE, ROWS, [1])),
        ("plant", planted(HANDLE, 0, [VOCAB_SIZE])),
        ("plant", planted(HANDLE, 0, [1, 2], count=1)),
        ("plant", planted(HANDLE, 0, [1, 2], count=3)),
        ("plant", planted(HANDLE, 0, [1], count=-1)),
        ("plant", planted(HANDLE, 0, [1] * (WIDTH + 1))),
        ("plant", planted(HANDLE, -1, [1])),
        ("prune", Pruned(pack([HANDLE]), pack([2]), pack([1]))),
        ("prune", Pruned(pack([HANDLE, HANDLE]), pack([1]), pack([1]))),
        ("fork", forked(HANDLE, [0], [1], [ROWS])),
        ("fork", forked(HANDLE, [0], [-5], [1])),
        ("fork", forked(HANDLE, [0, 1], [1], [1])),
    ],
)
def test_invalid_messages_are_refused(published: PublishedTrees, verb: str, message: Any) -> None:
    with pytest.raises((ValueError, IndexError)):
        getattr(published, verb)([message] if verb == "steps" else message)


def test_steps_applied_together_give_what_they_give_one_by_one() -> None:
    steps = [stepped([0, 2], [5, 6]), stepped([0, 2], [7, 8], ended=[2]), stepped([0], [9])]
    together, one_by_one = _with_fork(), _with_fork()
    together.steps(steps)
    for step in steps:
        one_by_one.steps([step])
    for each in (together, one_by_one):
        assert each.cache.row_tokens(0) == [1, 5, 7, 9]
        assert each.cache.row_tokens(2) == [4, 6, 8]
        assert each.cache.ended.tolist() == [False, False, True] + [False] * (ROWS - 3)


def _with_fork() -> PublishedTrees:
    """A tree with trunk 0 and fork 2."""
    published = PublishedTrees(DEPTH, VOCAB_SIZE)
    published.start(Ready(ROWS, 100, 16))
    published.announce(HANDLE)
    published.plant(planted(HANDLE, 0, [1]))
    published.fork(forked(HANDLE, [0], [4], [2]))
    return published


def test_steps_of_wrong_lengths_do_not_cancel_out() -> None:
    with pytest.raises(ValueError, match="does not fit its rows"):
        _with_fork().steps([stepped([0, 2], [5]), stepped([0, 2], [6, 7, 8])])


def test_a_row_cannot_grow_beyond_its_width(published: PublishedTrees) -> None:
    for _ in range(WIDTH - 2):
        published.steps([stepped([0], [1])])
    with pytest.raises(IndexError):
        published.steps([stepped([0], [1])])


# ---- sampled tokens

FIVE, SIX = {5: 0.5, 7: 0.5}, {6: 1.0}


def test_what_tokens_were_sampled_from_is_kept() -> None:
    published = sampling()
    published.fork(forked(HANDLE, [0], [4], [2]))
    # Together, as during a verification: in each step other rows have sampled.
    published.steps(
        [
            stepped([0, 2], [5, 6], sampled={0: FIVE}),
            stepped([0, 2], [8, 6], sampled={1: SIX}),
            stepped([0, 2], [9, 9]),
        ]
    )
    assert distributions_of(published, 0, 3) == [FIVE, {}, {}]
    assert distributions_of(published, 2, 4) == [{}, {}, SIX, {}]


def test_a_fork_that_becomes_the_trunk_keeps_what_its_tokens_were_sampled_from() -> None:
    published = sampling()
    published.steps([stepped([0], [5], sampled={0: FIVE})])
    published.fork(forked(HANDLE, [0], [4], [2]))
    published.steps([stepped([2], [6], sampled={0: SIX})])
    published.plant(planted(HANDLE, 2, [4, 6]))
    assert distributions_of(published, 2, 2) == [{}, SIX]


def test_a_trunk_that_is_cut_back_grows_by_what_is_sampled_then() -> None:
    published = sampling()
    published.steps([stepped([0], [5], sampled={0: FIVE})])
    published.plant(planted(HANDLE, 0, []))
    published.steps([stepped([0], [8])])
    assert distributions_of(published, 0, 1) == [{}]


@pytest.mark.parametrize("what", ["fork", "trunk", "tree of another request"])
def test_a_row_that_is_used_anew_has_sampled_nothing(what: str) -> None:
    published = sampling()
    published.fork(forked(HANDLE, [0], [4], [2]))
    published.steps([stepped([2], [5], sampled={0: FIVE})])
    published.prune(Pruned(pack([HANDLE]), pack([1]), pack([2])))
    if what == "fork":
        published.fork(forked(HANDLE, [0], [4], [2]))
    elif what == "trunk":
        published.plant(planted(HANDLE, 2, [4, 5]))
    else:
        published.announce(HANDLE + 1)
        published.plant(planted(HANDLE + 1, 2, [4, 5]))
    assert distributions_of(published, 2, 2) == [{}, {}]


def test_a_new_draft_process_has_sampled_nothing_yet() -> None:
    published = sampling()
    published.steps([stepped([0], [5], sampled={0: FIVE})])
    published.start(Ready(ROWS, 100, 16))
    assert distributions_of(published, 0, 1) == [{}]


SAMPLED = stepped([0], [5], sampled={0: FIVE})


@pytest.mark.parametrize(
    "step",
    [
        stepped([0], [8], sampled={0: FIVE}),
        stepped([0], [8], sampled={0: {5: 1.0, 8: 0.0}}),
        stepped([0], [8], sampled={0: {5: 1.5, 8: -0.5}}),
        stepped([0], [5], sampled={0: {5: 0.5, VOCAB_SIZE: 0.5}}),
        stepped([0], [5], sampled={0: {5: 0.5, -1: 0.5}}),
        stepped([0], [5], sampled={0: {5: 1.5, 6: -0.5}}),
        stepped([0], [5], sampled={0: {5: 0.5, 6: 0.4}}),
        stepped([0], [5], sampled={0: {5: 0.5, 6: np.nan}}),
        stepped([0], [5], sampled={0: {5: np.inf}}),
        stepped([0], [5], sampled={1: FIVE}),
        stepped([0], [5], sampled={-1: FIVE}),
        stepped([0], [5], sampled={0: dict.fromkeys(range(5, 9), 0.25)}),
        stepped([0], [5], sampled={0: {}}),
        stepped([0, 2], [5, 5], sampled={0: FIVE, 1: {}}),
        structs.replace(SAMPLED, supports=b""),
        structs.replace(SAMPLED, supports=pack([1])),
        structs.replace(SAMPLED, supports=pack([3])),
        structs.replace(SAMPLED, supports=pack([-1])),
        structs.replace(SAMPLED, supports=pack([1, 1])),
        structs.replace(SAMPLED, q_tokens=b""),
        structs.replace(SAMPLED, q_probabilities=b"1234"),
        structs.replace(SAMPLED, sampled=b"123"),
    ],
)
def test_distributions_that_cannot_be_are_refused(step: Stepped) -> None:
    published = sampling()
    published.fork(forked(HANDLE, [0], [4], [2]))

    def take_and_propose() -> None:
        published.steps([step])
        distributions_of(published, 0, 1)

    with pytest.raises((ValueError, IndexError)):
        take_and_propose()


def test_a_draft_that_shall_not_sample_is_refused_if_it_does() -> None:
    sampling().steps([SAMPLED])
    with pytest.raises(ValueError, match="none were asked for"):
        sampling(0).steps([SAMPLED])


numbers = st.lists(st.integers(-2, ROWS + 1) | st.just(VOCAB_SIZE), max_size=3).map(pack)
messages = st.one_of(
    st.builds(Planted, numbers, numbers, numbers, numbers, numbers, numbers, numbers),
    st.builds(Forked, numbers, numbers, numbers, numbers, numbers, numbers),
    st.builds(Pruned, numbers, numbers, numbers),
    st.builds(Stepped, numbers, numbers, numbers, numbers),
    st.builds(Stepped, numbers, numbers, numbers, numbers, numbers, numbers, numbers, numbers),
)


@given(st.lists(messages, max_size=8), st.lists(st.integers(0, 9), max_size=4))
def test_no_message_makes_a_look_up_fail(garbage: list[Any], text: list[int]) -> None:
    published = PublishedTrees(DEPTH, VOCAB_SIZE, MOST)
    published.start(Ready(ROWS, 100, 16))
    published.announce(HANDLE)
    published.plant(planted(HANDLE, 0, [1, 2]))
    verbs: dict[Any, Callable[[Any], None]] = {
        Planted: published.plant,
        Forked: published.fork,
        Pruned: published.prune,
        Stepped: lambda step: published.steps([step]),
    }
    for message in garbage:
        try:
            verbs[type(message)](message)
        except (ValueError, IndexError):
            published.clear()  # as a new epoch does
            published.announce(HANDLE)
    walk = published.cache.walk(HANDLE, text)
    (below,) = published.cache.look_up([HANDLE], [text])
    assert (below.where, below.row) == (walk.where, walk.row)
    assert all(0 <= token < VOCAB_SIZE for token in below.drafted)


@pytest.mark.parametrize("chance", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_chance_that_is_none_is_refused(published: PublishedTrees, chance: float) -> None:
    step = Stepped(pack([0]), pack([5]), b"", pack_floats(np.array([chance], np.float32)))
    with pytest.raises(ValueError, match="chance"):
        published.steps([step])
    tree = structs.replace(planted(HANDLE, 0, [5]), chances=step.chances)
    with pytest.raises(ValueError, match="chance"):
        published.plant(tree)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_trunk_needs_a_chance_for_each_token(published: PublishedTrees, count: int) -> None:
    tree = planted(HANDLE, 0, [5, 6])
    chances = pack_floats(np.full(count, 0.5, np.float32))
    with pytest.raises(ValueError, match="chance"):
        published.plant(structs.replace(tree, chances=chances))
