"""Targets that share a draft: each gets what it would get alone, and its fair share when short."""

from __future__ import annotations

import math
import random

import pytest

from tests.draft.invariants import check_always, check_at_rest, check_blocks, guard_writes
from tests.draft.simulation import Simulation, Sizes, TargetRequest
from vllm_ssd.draft.request import DORMANT
from vllm_ssd.wire.messages import Start
from vllm_ssd.wire.packing import pack

PROMPT = [1, 2, 3, 4, 5, 6]


def together(*sizes: Sizes) -> list[Simulation]:
    """Targets that share the draft of the first one."""
    sims = [Simulation(sizes[0])]
    sims += [Simulation(each, beside=sims[0]) for each in sizes[1:]]
    guard_writes(sims[0])
    return sims


def holds_trunk(sim: Simulation, request: TargetRequest) -> bool:
    return sim.session.share.requests[request.handle].trunk != DORMANT


def check_all(sims: list[Simulation]) -> None:
    for sim in sims:
        check_always(sim)


@pytest.mark.parametrize(
    ("short", "lookahead"),
    [
        pytest.param(False, False, id="plenty", marks=pytest.mark.slow),
        pytest.param(False, True, id="plenty, look-ahead"),
        pytest.param(True, False, id="short"),
        pytest.param(True, True, id="short, look-ahead", marks=pytest.mark.slow),
    ],
)
def test_trees_are_exact_whatever_the_others_do(short: bool, lookahead: bool) -> None:
    rng = random.Random(7 * short + lookahead)
    hits = narrowed = 0
    for _ in range(10):
        sizes = Sizes(depth=4, fan_out=None, lookahead=lookahead, max_length=48)
        if short:
            sizes = sizes._replace(
                max_rows=rng.choice([6, 10, 16]), num_blocks=rng.choice([24, 40])
            )
        others = [
            sizes._replace(depth=rng.randint(1, 4), branches=rng.choice([0, 3])) for _ in "ab"
        ]
        sims = together(sizes, *others)
        for _ in range(60):
            sim = rng.choice(sims)
            _something(sim, rng)
            for each in sims:
                each.draft_receives(rng.choice([1000, 1000, 1, 0]))
            sim.draft_steps(rng.choice([1000, 5, 2, 1, 0]))
            for each in sims:
                each.target_receives(rng.choice([1000, 1000, 1, 0]))
            check_all(sims)
        hits += sum(sim.hits for sim in sims)
        narrowed += sum(int(sim.session.counters["draft_narrowed"]) for sim in sims)
        for sim in sims[1:]:
            sim.leave()
            check_always(sims[0])
        sims[0].settle()
        check_always(sims[0])
        sims[0].leave()
        assert sims[0].blocks.all_free
    assert hits > 40
    assert narrowed > 0 or not short


def _something(sim: Simulation, rng: random.Random) -> None:
    """One thing that a target may do."""
    live = [request for request in sim.requests.values() if not request.over]
    what = rng.random()
    if not live or (what < 0.15 and len(live) < 4):
        temperature = rng.choice([0.0, 0.0, 0.8])
        prompt = [token % 7 for token in range(rng.randint(1, 9))]
        sim.start(prompt, rng.choice([40, 12, 3]), rng.choice([[], [0]]), temperature)
    elif what < 0.2:
        sim.resync()
    elif what < 0.25 and (over := [r for r in sim.requests.values() if r.over]):
        sim.finish(over)
    elif what < 0.3:
        sim.finish([rng.choice(live)])
    else:
        for request in live:
            accepted = rng.randint(0, request.verifying)
            refused = request.proposed[accepted : accepted + 1]
            token = next(one for one in sim.best(request.text) if [one] != refused)
            sim.confirm(request, accepted, token)
        sim.propose([request for request in live if not request.over])
        for request in live:
            if request.proposed:
                sim.hits += 1
                # A trunk that was lost meanwhile follows what was found in it.
                request.others.append((len(request.text), request.proposed))


def test_each_drafts_what_it_would_alone() -> None:
    alone = Simulation(Sizes())
    first, second = together(Sizes(), Sizes(depth=2, fan_out=(1, 1, 1)))
    for sim in (alone, first, second):
        request = sim.start(PROMPT)
        sim.settle()
        assert sim.verify(request, 0, sim.best(request.text)[0]) != []
        sim.settle()
        check_at_rest(sim)
    drafted = [sim.published.cache.trees[0] for sim in (alone, first)]
    ways = [
        sim.published.cache.row_tokens(tree.trunk)
        for sim, tree in zip((alone, first), drafted, strict=True)
    ]
    assert ways[0] == ways[1]


def test_a_common_beginning_is_computed_once() -> None:
    first, second = together(Sizes(), Sizes())
    first.start(PROMPT * 4)
    first.settle()
    before = second.engine.counters["draft_prefill_tokens"]
    second.start(PROMPT * 4)
    second.settle()
    assert second.engine.counters["draft_prefill_tokens"] - before <= first.sizes.block_size


def test_counters_are_those_since_a_target_has_joined() -> None:
    early = Simulation(Sizes())
    early.start(PROMPT)
    early.settle()
    late = Simulation(Sizes(), beside=early)
    assert early.session.counters["draft_steps"] > 0
    assert late.session.counters["draft_steps"] == 0
    late.start(PROMPT[2:])
    late.settle()
    counters = late.session.counters
    assert 0 < counters["draft_steps"] < early.session.counters["draft_steps"]


def test_a_burst_takes_no_live_trunk_from_another_target() -> None:
    sizes = Sizes(max_rows=8, num_blocks=400)
    calm, busy = together(sizes, sizes)
    mine = [calm.start([1, 2, 3 + n]) for n in range(3)]
    calm.settle()
    burst = [busy.start([4, 5, n]) for n in range(20)]
    busy.settle()
    check_all([calm, busy])
    assert all(holds_trunk(calm, request) for request in mine)
    assert sum(holds_trunk(busy, request) for request in burst) >= 4


def test_who_comes_later_gets_a_fair_share_of_the_rows() -> None:
    sizes = Sizes(max_rows=20, fan_out=None)
    early, late = together(sizes, sizes)
    for number in range(6):
        early.start([1, 2, number])
    early.settle()
    assert early.rows.free_count == 0
    request = late.start([3, 4])
    late.settle()
    check_all([early, late])
    forks = late.session.share.requests[request.handle].forks
    assert len(forks) >= 3
    assert early.session.share.held_rows() >= 10


def test_a_target_that_is_quiet_gives_its_rows_up() -> None:
    sizes = Sizes(max_rows=6)
    quiet, busy = together(sizes, sizes)
    for number in range(5):
        quiet.start([1, 2, number])
    quiet.settle()
    burst = [busy.start([4, 5, n]) for n in range(5)]
    busy.settle()
    assert sum(holds_trunk(busy, request) for request in burst) < 5
    quiet.session.share.last_heard = -math.inf
    for request in burst:
        busy.confirm(request, 0, busy.best(request.text)[0])
    busy.propose(burst)
    busy.settle()
    check_all([quiet, busy])
    assert all(holds_trunk(busy, request) for request in burst)


def test_a_wait_of_one_target_does_not_stop_the_others() -> None:
    waiting, other = together(Sizes(), Sizes())
    awaited, beside = waiting.start(PROMPT), waiting.start([6, 5, 4])
    served = other.start(PROMPT[1:])
    for sim in (waiting, other):
        sim.settle()
    for sim, requests in ((waiting, [awaited, beside]), (other, [served])):
        for request in requests:
            sim.confirm(request, 0, sim.best(request.text)[-1])
    waiting.propose([awaited, beside], waits=[awaited])
    other.propose([served])
    waiting.draft_receives(1)
    other.draft_receives(1)
    computed = waiting.rows.computed
    of_other = other.session.share.requests[served.handle].trunk
    of_beside = waiting.session.share.requests[beside.handle].trunk
    before = int(computed[of_other]), int(computed[of_beside])
    waiting.draft_steps(1)
    assert int(computed[of_other]) > before[0]
    assert int(computed[of_beside]) == before[1]
    waiting.target_receives(10)
    waiting.decide({awaited.handle: []})
    waiting.settle()
    check_all([waiting, other])


def test_a_target_that_loses_its_place_costs_the_others_nothing() -> None:
    lost, other = together(Sizes(), Sizes())
    lost.start(PROMPT)
    request = other.start(PROMPT[2:])
    other.settle()
    tree = other.published.cache.trees[request.handle]
    lost.resync()
    lost.settle()
    check_all([lost, other])
    assert other.published.cache.trees[request.handle] is tree
    assert holds_trunk(other, request)


def test_a_row_of_another_target_brings_none_of_its_settings() -> None:
    several = Simulation(Sizes(sampling="auto", fan_out=None))
    one = Simulation(Sizes(sampling="greedy", fan_out=None), beside=several)
    assert several.session._drafting.settings.count > one.session._drafting.settings.count
    first = one.start([1, 2, 3])
    one.settle()
    one.confirm(first, 0, one.best(first.text)[0])
    one.propose([first], speculate=False)
    one.settle()
    sampled = several.start(PROMPT, temperature=1.0)
    several.settle()
    several.verify(sampled, 0, several.best(sampled.text)[0])
    several.settle()
    row = several.session.share.requests[sampled.handle].trunk
    assert several.rows.sampled.setting[row] > 0
    several.finish([sampled])
    several.settle()
    resting = one.start([4, 5, 6])  # nothing is drafted for it, so nothing says how
    one.draft_receives(10)
    assert one.session.share.requests[resting.handle].trunk == row
    one.confirm(resting, 0, one.best(resting.text)[0])
    one.propose([resting], speculate=False)
    several.start(PROMPT[:4])
    several.settle()
    check_all([several, one])


def test_what_an_error_lost_is_found_again() -> None:
    sim, other = together(Sizes(), Sizes())
    sim.start(PROMPT)
    other.start(PROMPT)
    sim.settle()
    sim.rows.take(3)
    sim.session.reset()
    other.session.handle(Start(9, pack([1, 2]), 20, []))
    check_blocks(other)
    owned = sum(each.session.share.held_rows() for each in (sim, other))
    assert sim.rows.free_count == sim.sizes.max_rows - owned


def test_who_has_left_takes_no_time_any_more() -> None:
    sims = together(Sizes(), Sizes())
    requests = [sim.start(PROMPT) for sim in sims]
    both = list(zip(sims, requests, strict=True))
    for _ in range(5):
        for sim, request in both:
            sim.verify(request, 0, sim.greedy(request, 1)[0])
            sim.draft_receives()
        sims[0].settle()
        sims[1].settle()
    assert sims[0].session._times._others > 0.5
    sims[1].leave()
    for _ in range(5):
        sims[0].verify(requests[0], 0, sims[0].greedy(requests[0], 1)[0])
        sims[0].settle()
    assert sims[0].session._times._others < 0.1
