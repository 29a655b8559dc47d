"""Outcomes are learned from beside the next step, and each of them once."""

from __future__ import annotations

import pytest

from tests.draft.simulation import Simulation, Sizes, TargetRequest

PROMPT = [1, 2, 3, 4, 5, 6]


@pytest.fixture(params=[False, True], ids=["one step", "look-ahead"])
def sim(request: pytest.FixtureRequest) -> Simulation:
    return Simulation(Sizes(lookahead=request.param))


def acceptance(sim: Simulation) -> float:
    """What is learned: the chance that a drafted token is accepted."""
    return sim.session._outcomes.acceptance


def verifying(sim: Simulation) -> TargetRequest:
    """A request with a proposal that is being verified; the draft has come to rest."""
    request = sim.start(PROMPT)
    sim.settle()
    sim.verify(request, 0, sim.best(request.text)[0])
    sim.settle()
    assert request.verifying == sim.sizes.depth
    return request


def accept(sim: Simulation, request: TargetRequest, wait: bool = False) -> None:
    """All tokens are accepted, and the draft is told."""
    sim.confirm(request, request.verifying, sim.best(request.text + request.proposed)[0])
    sim.propose([request], waits=[request] if wait else [])
    sim.draft_receives()


def test_forks_do_not_wait_for_what_is_learned(sim: Simulation) -> None:
    request = verifying(sim)
    before = acceptance(sim)
    forks = sim.session.counters["draft_forks"]
    accept(sim, request)
    assert sim.session.counters["draft_forks"] > forks
    assert acceptance(sim) == before
    sim.draft_steps()
    learned = acceptance(sim)
    assert learned > before
    sim.settle()
    assert acceptance(sim) == learned


def test_steps_that_the_target_waits_for_do_not_either(sim: Simulation) -> None:
    request = verifying(sim)
    before = acceptance(sim)
    accept(sim, request, wait=True)
    sim.draft_steps(2)
    sim.target_receives(9)
    assert acceptance(sim) == before
    sim.decide({request.handle: sim.look_up(request).drafted})
    sim.settle()
    assert acceptance(sim) > before


def test_an_outcome_that_is_followed_by_another_at_once_is_not_lost(sim: Simulation) -> None:
    request = verifying(sim)
    before = acceptance(sim)
    accept(sim, request)
    sim.target_receives(9)
    assert acceptance(sim) == before
    accept(sim, request)
    assert acceptance(sim) > before
