"""While nothing is proposed the draft is quiet and follows the texts; then it is there again."""

from __future__ import annotations

import pytest

from tests.draft.invariants import check_always, check_at_rest, check_blocks, guard_writes
from tests.draft.simulation import Simulation, Sizes, TargetRequest
from vllm_ssd.draft.request import DORMANT
from vllm_ssd.draft.rounds import KEEP_UP_TOKENS

PROMPT = [1, 2, 3, 4, 5, 6]
LONG = Sizes(max_length=256, num_blocks=400)


@pytest.fixture(params=[False, True], ids=["", "lookahead"])
def sim(request: pytest.FixtureRequest) -> Simulation:
    simulation = Simulation(LONG._replace(lookahead=request.param))
    guard_writes(simulation)
    return simulation


def decode_plainly(sim: Simulation, requests: list[TargetRequest], rounds: int) -> None:
    """So many rounds without speculation."""
    for _ in range(rounds):
        for request in requests:
            sim.confirm(request, 0, sim.best(request.text)[1])
        sim.propose(requests, speculate=False)
        sim.settle()
        check_always(sim)


def held(sim: Simulation, request: TargetRequest) -> tuple[int, int]:
    """How many forks a request has, and how many of its tokens are computed."""
    there = sim.session.share.requests[request.handle]
    computed = 0 if there.trunk == DORMANT else int(sim.rows.computed[there.trunk])
    return len(there.forks), computed


def test_forks_are_freed_and_no_step_is_made_for_a_token(sim: Simulation) -> None:
    request = sim.start(PROMPT)
    sim.settle()
    assert held(sim, request)[0] > 0
    rows = sim.rows.free_count
    decode_plainly(sim, [request], 1)
    assert held(sim, request)[0] == 0
    assert sim.rows.free_count > rows
    assert request.handle in sim.published.withdrawn
    forwards = sim.model.forwards
    decode_plainly(sim, [request], KEEP_UP_TOKENS - 3)
    assert sim.model.forwards == forwards
    # Nothing is left to be sent either.
    sim.confirm(request, 0, 0)
    sim.propose([request], speculate=False)
    sim.draft_receives()
    assert not any(sim.to_target)


def test_the_text_is_followed_in_chunks(sim: Simulation) -> None:
    request = sim.start(PROMPT)
    sim.settle()
    forwards = sim.model.forwards
    decode_plainly(sim, [request], 4 * KEEP_UP_TOKENS)
    # A chunk takes one step, or a few where the step's budget is smaller.
    assert sim.model.forwards - forwards <= 4 * (1 + KEEP_UP_TOKENS // LONG.prefill_chunk_idle)
    assert len(request.text) - held(sim, request)[1] <= KEEP_UP_TOKENS


def test_it_hits_again_in_the_second_round(sim: Simulation) -> None:
    request = sim.start(PROMPT)
    sim.settle()
    decode_plainly(sim, [request], 3 * KEEP_UP_TOKENS + 5)
    forwards = sim.model.forwards
    assert sim.verify(request, 0, sim.greedy(request, 1)[0]) == []
    sim.settle()
    check_always(sim)
    check_at_rest(sim)
    # What is missing of the text is one chunk at most.
    assert sim.model.forwards - forwards <= 2 + 2 * LONG.depth + KEEP_UP_TOKENS // 16
    (token,) = sim.greedy(request, 1)
    assert len(sim.verify(request, 0, token)) == LONG.depth


def test_several_rounds_may_come_as_one(sim: Simulation) -> None:
    request = sim.start(PROMPT)
    sim.settle()
    decode_plainly(sim, [request], 1)
    for _ in range(20):
        sim.confirm(request, 0, sim.best(request.text)[2])
    sim.propose([request], speculate=False)
    sim.settle()
    for _ in range(7):
        sim.confirm(request, 0, sim.best(request.text)[2])
    sim.propose([request])
    sim.settle()
    check_always(sim)
    check_at_rest(sim)
    assert len(sim.verify(request, 0, sim.greedy(request, 1)[0])) == LONG.depth


def test_requests_that_come_meanwhile_are_prefilled_but_not_drafted_for(sim: Simulation) -> None:
    first = sim.start(PROMPT)
    sim.settle()
    decode_plainly(sim, [first], 2)
    prompt = [token % 11 for token in range(3 * KEEP_UP_TOKENS)]
    second = sim.start(prompt)
    sim.settle()
    assert held(sim, second) == (0, len(prompt))
    assert second.handle in sim.published.withdrawn
    decode_plainly(sim, [first, second], 3)
    for request in (first, second):
        sim.confirm(request, 0, sim.greedy(request, 1)[0])
    sim.propose([first, second])
    sim.settle()
    check_at_rest(sim)
    assert len(sim.verify(second, 0, sim.greedy(second, 1)[0])) == LONG.depth


def test_what_requests_outside_the_batch_hold_is_freed_too(sim: Simulation) -> None:
    resting, running = sim.start(PROMPT), sim.start([*PROMPT, 7])
    sim.settle()
    decode_plainly(sim, [running], 1)
    assert held(sim, resting)[0] == 0
    assert resting.handle in sim.published.withdrawn


def test_short_of_blocks_it_rests_without_them() -> None:
    sim = Simulation(LONG._replace(num_blocks=12))
    requests = [sim.start([*PROMPT, token]) for token in range(3)]
    sim.settle()
    decode_plainly(sim, requests, 3 * KEEP_UP_TOKENS)
    sim.finish(requests)
    sim.settle()
    check_blocks(sim)
    assert sim.blocks.free_count == 11


def test_plain_steps_do_not_say_how_long_a_verification_takes(sim: Simulation) -> None:
    request = sim.start(PROMPT)
    sim.settle()
    sim.verify_us = 40_000
    for _ in range(3):
        sim.verify(request, 0, sim.greedy(request, 1)[0])
        sim.settle()
    before = dict(sim.session._times._verify_seconds)
    assert any(before.values())
    sim.verify_us = 5_000
    decode_plainly(sim, [request], 3)
    sim.verify(request, 0, sim.greedy(request, 1)[0])
    sim.settle()
    assert sim.session._times._verify_seconds == before
