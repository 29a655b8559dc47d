"""The number of branches in a round follows from the times of a step and of a verification."""

from __future__ import annotations

import pytest

from tests.draft.invariants import check_always, check_at_rest, paths
from tests.draft.simulation import Simulation, Sizes

PROMPT = [1, 2, 3, 4, 5, 6]
VERIFY_US = 10_000


def branches(step_ms: float, row_ms: float, requests: int = 1, max_branches: int = 0) -> list[int]:
    """Branches of each request in the second round, with a draft of this pace."""
    sim = Simulation(Sizes(branches=max_branches))
    sim.verify_us = VERIFY_US
    for step in range(10_000):  # far more than the steps the toy takes itself
        rows = 1 + step % 24
        sim.engine.step_times.observe(rows, 1e-3 * (step_ms + row_ms * rows))
    started = [sim.start([*PROMPT, token]) for token in range(requests)]
    sim.settle()
    for request in started:
        sim.confirm(request, 0, sim.greedy(request, 1)[0])
    sim.propose(started)
    sim.settle()
    check_always(sim)
    check_at_rest(sim)
    trees = sim.published.cache.trees
    return [len(paths(sim.published.cache, trees[request.handle])) for request in started]


def test_a_fast_draft_drafts_every_outcome() -> None:
    assert branches(step_ms=0.1, row_ms=0.01) == [Sizes().max_branches]


def test_a_slow_draft_drafts_the_likeliest_outcomes_only() -> None:
    (count,) = branches(step_ms=1.0, row_ms=2.0)
    assert 1 <= count <= 3


def test_requests_share_what_there_is_time_for() -> None:
    (alone,) = branches(step_ms=1.0, row_ms=0.2)
    together = branches(step_ms=1.0, row_ms=0.2, requests=6)
    assert max(together) < alone
    assert min(together) >= 1


@pytest.mark.parametrize("wanted", [1, 3, 6])
def test_a_fixed_number_of_branches_holds_at_any_pace(wanted: int) -> None:
    assert branches(step_ms=1.0, row_ms=2.0, max_branches=wanted) == [wanted]
