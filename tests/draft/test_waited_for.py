"""A request that is waited for is served first, alone; then its trunk follows what is proposed."""

from __future__ import annotations

import pytest

from tests.draft.invariants import check_always, check_at_rest, guard_writes, paths
from tests.draft.simulation import Simulation, Sizes, TargetRequest
from vllm_ssd.draft.session import OutOfStepError
from vllm_ssd.draft.validation import Bounds, check
from vllm_ssd.wire.messages import Proposed, Verified
from vllm_ssd.wire.packing import pack

PROMPTS = ([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [3, 3, 3])
DEPTH = 3


@pytest.fixture(params=[False, True], ids=["one step", "look-ahead"])
def sim(request: pytest.FixtureRequest) -> Simulation:
    found = Simulation(Sizes(lookahead=request.param))
    guard_writes(found)
    return found


def missed(sim: Simulation, others: int = 1) -> tuple[TargetRequest, list[TargetRequest]]:
    """A request with an outcome that was not guessed, and others that hit; nothing is sent yet."""
    requests = [sim.start(prompt) for prompt in PROMPTS[: 1 + others]]
    sim.settle()
    first, *rest = requests
    sim.confirm(first, 0, sim.best(first.text)[-1])
    for request in rest:
        sim.confirm(request, 0, sim.best(request.text)[0])
    return first, rest


def found(sim: Simulation, request: TargetRequest) -> list[int]:
    return sim.look_up(request).drafted


def test_its_trunk_alone_is_decoded_and_published_step_by_step(sim: Simulation) -> None:
    first, rest = missed(sim, others=2)
    sim.propose([first, *rest], waits=[first])
    sim.draft_receives()
    sim.target_receives(9)
    forks = sim.session.counters["draft_forks"]
    before = len(sim.model.sequences)
    for count in range(1, DEPTH + 1):
        sim.draft_steps()
        sim.target_receives(9)
        assert found(sim, first) == sim.greedy(first, count)
        check_always(sim)
    assert sim.model.sequences[before : before + DEPTH] == [1] * DEPTH
    assert sim.session.counters["draft_forks"] == forks
    # Once the target has decided, all go on.
    sim.decide({first.handle: found(sim, first)})
    sim.settle()
    assert sim.session.counters["draft_forks"] > forks
    check_always(sim)
    check_at_rest(sim)
    for request in rest:
        assert sim.verify(request, DEPTH, sim.best(request.text + request.proposed)[0])


def test_a_prompt_that_is_waited_for_is_prefilled_before_others() -> None:
    sim = Simulation()
    waited, other = sim.start([1, 2, 3] * 5), sim.start([4, 5, 6] * 10)
    sim.confirm(waited, 0, 7)
    sim.propose([waited], waits=[waited])
    sim.draft_receives(3)
    sim.draft_steps(4)
    sim.deliver()
    assert found(sim, waited)
    assert int(sim.rows.computed[sim.session.share.requests[other.handle].trunk]) == 0
    sim.decide({waited.handle: []})
    sim.settle()
    check_at_rest(sim)


@pytest.mark.parametrize("kept", range(DEPTH + 1))
@pytest.mark.parametrize("others", [[], [2], [2, 9], [9, 2, 0]])
@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_the_trunk_follows_whatever_is_proposed(
    sim: Simulation, kept: int, others: list[int], steps: int
) -> None:
    first, rest = missed(sim)
    sim.propose([first, *rest], waits=[first])
    sim.draft_receives()
    sim.draft_steps(steps)
    sim.target_receives(99)
    proposal = [*found(sim, first)[:kept], *others][:DEPTH]
    sim.decide({first.handle: proposal})
    sim.deliver()
    for _ in range(20):
        sim.draft_steps()
        sim.target_receives(99)
        check_always(sim)
    sim.settle()
    check_at_rest(sim)
    cache = sim.published.cache
    held = paths(cache, cache.trees[first.handle])
    trunk = held[()]
    assert trunk[: len(proposal)] == proposal
    after = sim.best(first.text + proposal)
    # Tokens that it had beyond the proposal stay; else it goes on by its own choices.
    assert trunk[len(proposal)] == after[0]
    for k, token in enumerate(proposal):
        guessed = [key[1] for key in held if key and key[0] == k]
        best = [choice for choice in sim.best(first.text + proposal[:k]) if choice != token]
        assert guessed == best[: len(guessed)]
        assert guessed
    for k in range(len(proposal) + 1):
        # What is guessed hits at full depth.
        text = first.text + proposal[:k]
        outcome = next(t for t in sim.best(text) if t not in proposal[k : k + 1])
        (below,) = cache.look_up([first.handle], [[*proposal[:k], outcome]])
        assert below.drafted == sim.greedy_after([*text, outcome], DEPTH)


def test_a_proposal_with_other_tokens_needs_no_wait(sim: Simulation) -> None:
    first, rest = missed(sim)
    sim.propose([first, *rest], more={first.handle: [9, 2], rest[0].handle: [1]})
    sim.settle()
    check_always(sim)
    check_at_rest(sim)
    assert first.proposed == [9, 2]
    assert sim.verify(first, 2, sim.best([*first.text, 9, 2])[0]) == sim.greedy(first, DEPTH)


def test_trimmed_where_the_trunk_follows_other_tokens(sim: Simulation) -> None:
    first, rest = missed(sim)
    sim.propose([first, *rest], waits=[first])
    sim.draft_receives()
    proposal = [9, 2, 9]
    sim.decide({first.handle: proposal})
    sim.trim(first, 1)
    sim.settle()
    check_always(sim)
    check_at_rest(sim)
    after = first.text + proposal[:1]
    assert sim.verify(first, 1, sim.best(after)[0]) == sim.greedy(first, DEPTH)


def test_a_verification_without_the_proposal_ends_the_wait(sim: Simulation) -> None:
    first, rest = missed(sim)
    sim.propose([first, *rest], waits=[first])
    sim.deliver()
    sim.confirm(first, 0, sim.best(first.text)[0])
    sim.propose([first])
    sim.settle()
    check_at_rest(sim)
    assert not sim.session.share.awaited


def test_a_wait_for_a_request_that_finishes_ends(sim: Simulation) -> None:
    first, rest = missed(sim)
    sim.propose([first, *rest], waits=[first])
    sim.deliver()
    sim.finish([first])
    sim.settle()
    check_at_rest(sim)
    assert not sim.session.share.awaited


@pytest.mark.parametrize("handles", [[1], [0, 0], [7]])
def test_a_proposal_for_a_request_that_is_not_waited_for_is_out_of_step(
    sim: Simulation, handles: list[int]
) -> None:
    first, rest = missed(sim)
    sim.propose([first, *rest], waits=[first])
    sim.deliver()
    with pytest.raises(OutOfStepError):
        sim.session.proposed(Proposed(pack(handles), pack([0] * len(handles)), b""))
    sim.session.reset()
    assert sim.rows.free_count == sim.sizes.max_rows


@pytest.mark.parametrize(
    ("counts", "tokens"), [([4], [1] * 4), ([-1], []), ([1], []), ([1], [12]), ([1], [-1])]
)
def test_proposals_that_make_no_sense_are_refused(counts: list[int], tokens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"count|token"):
        check(Proposed(pack([0]), pack(counts), pack(tokens)), Bounds(12, 64, DEPTH))


def test_a_verification_may_leave_the_proposal_open() -> None:
    bounds = Bounds(12, 64, DEPTH)
    fine = Verified(pack([0, 1]), pack([3, 3]), pack([1, 1]), pack([-1, 1]), pack([1, 2, 3]), 0)
    check(fine, bounds)
    for counts in ([-2, 1], [-1, 4], [-1, 2]):
        wrong = Verified(pack([0, 1]), pack([3, 3]), pack([1, 1]), pack(counts), pack([1, 2, 3]), 0)
        with pytest.raises(ValueError, match="count"):
            check(wrong, bounds)


def test_tokens_forced_on_a_trunk_are_its_own_after_they_were_trimmed(sim: Simulation) -> None:
    first, rest = missed(sim, others=0)
    assert not rest
    unlikely = sim.best(first.text)[1]
    sim.propose([first], [], {first.handle: [unlikely]})
    sim.settle()
    # The token stays in the trunk as the guess of what follows: it gets no fork beside it.
    sim.trim(first, 0)
    sim.settle()
    check_always(sim)
