"""What must hold between any two messages."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from tests.draft.simulation import Simulation, TargetRequest
from tests.draft.toy_model import toy_q
from vllm_ssd.core.tree import SpeculationCache, Tree
from vllm_ssd.draft.request import DORMANT, Request

Paths = dict[tuple[int, ...], list[int]]
"""Tokens of the trunk, under ``()``, and of each fork, under its ``(k, t*)``."""


def paths(cache: SpeculationCache, tree: Tree) -> Paths:
    """All that a tree holds."""
    found: Paths = {(): cache.row_tokens(tree.trunk)}
    for outcome, row in _rows_of(tree).items():
        found[outcome] = cache.row_tokens(row)
    return found


def check_always(sim: Simulation) -> None:
    """Check what must hold in every state."""
    for handle, tree in sim.published.cache.trees.items():
        request = sim.requests[handle]
        assert tree.base <= request.told
        check_tree(sim, sim.published.cache, tree, request, request.text)
        check_q(sim, request, tree)
        check_chances(sim, tree)
    for handle, request_there in sim.session.share.requests.items():
        if (tree_there := sim.cache.trees.get(handle)) is not None:
            assert request_there.trunk == tree_there.trunk
            text_there = request_there.text[: request_there.length].tolist()
            asked = sim.requests.get(handle)
            if asked is not None:
                check_tree(sim, sim.cache, tree_there, asked, text_there)
    assert sim.cache.trees.keys() <= sim.session.share.requests.keys()
    check_rows(sim)
    check_blocks(sim)
    if not sim.to_draft and not sim.to_target:
        check_trees_agree(sim)


def check_tree(
    sim: Simulation, cache: SpeculationCache, tree: Tree, request: TargetRequest, text: list[int]
) -> None:
    """A tree holds the model's tokens for exactly this text, and what the target proposed."""
    base = text[: tree.base]
    assert len(base) == tree.base
    held = paths(cache, tree)
    trunk = held.pop(())
    check_continuation(sim, base, trunk, request)
    for (k, first), branch in held.items():
        assert k <= len(trunk)
        assert trunk[k : k + 1] != [first], "a fork of the very token it leaves"
        assert branch[0] == first
        check_continuation(sim, base + trunk[:k] + [first], branch[1:], request)


def check_continuation(
    sim: Simulation, text: list[int], drafted: list[int], request: TargetRequest
) -> None:
    """Greedy requests go on with first choices, the others with any that can be sampled; all of
    them with what the target proposed instead."""
    count = sim.sizes.sampled_from if request.temperature else 1
    for token in drafted:
        assert token in sim.best(text)[:count] or request.follows([*text, token])
        text = [*text, token]


def check_q(sim: Simulation, request: TargetRequest, tree: Tree) -> None:
    """Every published token has the q' of its own text and position, or is certain."""
    cache, sizes = sim.published.cache, sim.sizes
    text = request.text[: tree.base]
    trunk = cache.row_tokens(tree.trunk)
    branches = [(tree.trunk, text, trunk, 0)]
    for (k, _), row in _rows_of(tree).items():
        branches.append((row, text + trunk[:k], cache.row_tokens(row), 1))
    for row, before, tokens, first in branches:
        for i, token in enumerate(tokens[first:], first):
            q = sim.drawn_from.get((row, len(before) + i))
            if not request.temperature:
                assert q is None
                continue
            so_far = before + tokens[:i]
            expected = toy_q(
                so_far,
                sizes.vocab_size,
                sim.model.confidence_at(len(so_far)),
                sizes.sampled_from,
                sim.model.num_candidates,
                request.temperature,
                request.top_k,
                request.top_p,
                request.stop,
            )
            if q is None:  # a guess, or nothing else is left
                possible = sim.best(so_far)[: request.top_k or sizes.sampled_from]
                left_by_c = sizes.saguaro_c < 1.0 and token in possible
                only_one = expected[token] == 1.0 or (left_by_c and token not in request.stop)
                followed = request.follows([*so_far, token])
                assert only_one or followed or token == sim.best(so_far)[0]
                continue
            assert q[token] > 0.0
            found = np.zeros(sizes.vocab_size)
            found[list(q)] = list(q.values())
            assert abs(found.sum() - 1.0) < 1e-6
            assert not found[request.stop].any()
            if sizes.saguaro_c == 1.0:
                np.testing.assert_allclose(found, expected, atol=1e-5)


def check_chances(sim: Simulation, tree: Tree) -> None:
    """Every published token has the chance stated for it, but for the guesses that forks are."""
    cache = sim.published.cache
    for row in (tree.trunk, *_rows_of(tree).values()):
        first = int(row != tree.trunk)
        start, length = int(cache.start[row]), int(cache.length[row])
        stated = [sim.chances[row, start + i] for i in range(first, length)]
        assert cache.chance[row, first:length].tolist() == stated


def _rows_of(tree: Tree) -> dict[tuple[int, int], int]:
    """The rows of the forks."""
    found = {}
    for keys, rows in tree.forks:
        for key, row in zip(keys.tolist(), rows.tolist(), strict=True):
            if key >= 0:  # not pruned
                found[key >> 32, key & 0xFFFFFFFF] = row
    return found


def check_trees_agree(sim: Simulation) -> None:
    """The target's copy holds what the draft holds."""
    theirs, ours = sim.cache, sim.published.cache
    assert ours.trees.keys() == theirs.trees.keys()
    for handle, tree in theirs.trees.items():
        copy = ours.trees[handle]
        assert (copy.base, copy.trunk) == (tree.base, tree.trunk)
        assert paths(ours, copy) == paths(theirs, tree)
        for row in [tree.trunk, *sim.session.share.requests[handle].forks]:
            assert ours.ended[row] == theirs.ended[row]
            first, length = int(row != tree.trunk), int(theirs.length[row])
            chances = [cache.chance[row, first:length].tolist() for cache in (ours, theirs)]
            assert chances[0] == chances[1]


def check_rows(sim: Simulation) -> None:
    """Each row has one owner, and those that decode have blocks of their own to write to."""
    rows, size = sim.rows, sim.blocks.block_size
    owned: list[int] = []
    for request in sim.engine.allocator.requests():
        if request.trunk == DORMANT:
            assert not request.forks
            assert not request.blocks
            continue
        owned += [request.trunk, *request.forks]
        trunk_cover = range(len(request.blocks))
        trunk_ids = [block.block_id for block in request.blocks]
        assert table(sim, request.trunk)[: len(trunk_ids)] == trunk_ids
        _check_cover(sim, request.trunk, trunk_cover)
        for row, own in request.forks.items():
            first = int(rows.start[row]) // size
            ids = [block.block_id for block in own]
            assert table(sim, row)[: first + len(own)] == trunk_ids[:first] + ids
            _check_cover(sim, row, range(first, first + len(own)))
    free = rows._free + rows._waiting
    assert sorted(owned + free) == list(range(len(rows.start)))
    assert not rows.pending[free].any()


def table(sim: Simulation, row: int) -> list[int]:
    """A row's block table as the model will have it at the next forward."""
    changes = sim.rows.tables
    held: list[int] = sim.model._tables[changes._trunks.get(row, row)].tolist()
    for first, blocks in changes._entries.get(row, []):
        held[first : first + len(blocks)] = blocks
    return held


def _check_cover(sim: Simulation, row: int, own: range) -> None:
    """All positions that the row has yet to write lie in blocks of its own."""
    rows, size = sim.rows, sim.sizes.block_size
    if rows.pending[row]:
        next_one = int(rows.computed[row])
        last_one = next_one + int(rows.room[row])
        assert next_one // size in own
        assert last_one // size in own


def owners(request: Request) -> list[Any]:
    """The blocks a request holds, each as often as it holds it."""
    return request.blocks + [block for own in request.forks.values() for block in own]


def check_blocks(sim: Simulation) -> None:
    """Reference counts are the numbers of owners; the rest is free."""
    held: Counter[int] = Counter()
    for request in sim.engine.allocator.requests():
        held.update(block.block_id for block in owners(request))
    # A copy that is still to be made holds its source.
    held.update(source.block_id for source in sim.blocks._copies.values())
    for block in sim.blocks._pool.blocks:
        if not block.is_null:
            assert block.ref_cnt == held[block.block_id]
    assert sim.blocks.free_count == sim.blocks.count - len(held)


def guard_writes(sim: Simulation) -> None:
    """Have every write checked: its blocks have one owner and are not in the prefix cache."""

    def check(written: set[int]) -> None:
        blocks = sim.blocks._pool.blocks
        held: Counter[int] = Counter()
        for request in sim.engine.allocator.requests():
            held.update(block.block_id for block in owners(request))
        for block_id in written:
            assert held[block_id] == 1
            assert sim.blocks._pool.is_block_writable(blocks[block_id])

    sim.model.before_write = check


def check_at_rest(sim: Simulation) -> None:
    """Everything has arrived and the draft is idle: nothing may be pending for the target."""
    depth = sim.sizes.depth
    waits = any(request.waits for request in sim.requests.values())
    for request in sim.requests.values():
        nothing_to_draft = request.limit - len(request.text) <= 1
        if request.handle in sim.published.withdrawn or nothing_to_draft or request.over:
            continue
        tree = sim.published.cache.trees[request.handle]
        assert tree.base == request.told
        ended, length = sim.published.cache.ended, sim.published.cache.length
        left = request.limit - tree.base
        if request.waits:
            assert ended[tree.trunk] or length[tree.trunk] >= min(depth, left)
        if waits:
            continue  # no forks are made meanwhile
        assert tree.complete
        wanted = min(len(request.proposed) + 1 + depth, left)
        assert ended[tree.trunk] or length[tree.trunk] >= wanted
        for keys, rows in tree.forks:
            for key, row in zip(keys.tolist(), rows.tolist(), strict=True):
                k = key >> 32
                if 0 <= k <= request.verifying:
                    assert ended[row] or length[row] == 1 + min(depth, left - k - 1)
