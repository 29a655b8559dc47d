"""Whatever happens, in whatever order: the trees hold what was drafted for exactly that text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.draft.invariants import check_always, check_at_rest, check_blocks, guard_writes
from tests.draft.simulation import Simulation, Sizes, TargetRequest
from vllm_ssd.core.fanout import geometric_fan_out

MAX_REQUESTS = 5
MAX_LENGTH = 48
OPENING = [token % 7 for token in range(3, 30, 2)]
"""What many prompts begin with, so that they share KV."""


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    """Anything from plenty to far too little."""
    depth = draw(st.integers(1, 4))
    fan_out = draw(
        st.one_of(
            st.integers(1, 4).map(lambda each: (each,) * (depth + 1)),
            st.integers(1, 4).map(lambda each: geometric_fan_out(depth, each, 0.7, 1.0)),
            st.lists(st.integers(0, 4), min_size=depth + 1, max_size=depth + 1)
            .filter(any)
            .map(tuple),
        )
    )
    return Sizes(
        depth=depth,
        fan_out=fan_out,
        max_branches=draw(st.sampled_from([0, 0, 1, 2, 5])),
        vocab_size=8,
        num_blocks=draw(st.sampled_from([4, 9, 16, 24, 40, 400])),
        block_size=draw(st.sampled_from([2, 3, 4, 8])),
        max_rows=draw(st.sampled_from([1, 2, 4, 8, 64])),
        max_length=MAX_LENGTH,
        prefill_chunk=draw(st.integers(1, 6)),
        prefill_chunk_idle=draw(st.integers(6, 20)),
        caching=draw(st.booleans()),
    )


class TargetAndDraft(RuleBasedStateMachine):
    """Everything a target may do, in any order, with messages that take their time."""

    @initialize(its_sizes=sizes())
    def begin(self, its_sizes: Sizes) -> None:
        self.sim = Simulation(its_sizes)
        guard_writes(self.sim)

    @property
    def live(self) -> list[TargetRequest]:
        return [request for request in self.sim.requests.values() if not request.over]

    def some(self, data: st.DataObject, which: Callable[[TargetRequest], bool]) -> TargetRequest:
        return data.draw(st.sampled_from([r for r in self.live if which(r)]))

    def verify(self, data: st.DataObject, request: TargetRequest) -> None:
        """One verification: some proposed tokens are accepted, then comes a token."""
        accepted = data.draw(st.integers(0, request.verifying), label="accepted")
        rejected = request.proposed[accepted : min(accepted + 1, request.verifying)]
        tokens = range(self.sim.sizes.vocab_size)
        possible = [token for token in tokens if token not in rejected]
        text = request.text + request.proposed[:accepted]
        likely = [
            t for t in self.sim.best(text)[: 1 + max(self.sim.sizes.fan_out)] if t in possible
        ]
        token = data.draw(st.sampled_from(likely or possible) | st.sampled_from(possible))
        self.sim.confirm(request, accepted, token)

    # ---- the target

    @precondition(lambda self: len(self.sim.requests) < MAX_REQUESTS)
    @rule(
        shared=st.integers(0, len(OPENING)),
        tail=st.lists(st.integers(0, 7), min_size=1, max_size=6),
        max_tokens=st.integers(1, 24),
        stop=st.sampled_from([[], [0], [1, 4]]),
    )
    def a_request_arrives(
        self, shared: int, tail: list[int], max_tokens: int, stop: list[int]
    ) -> None:
        self.sim.start(OPENING[:shared] + tail, max_tokens, stop)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def a_batch_is_verified(self, data: st.DataObject) -> None:
        batch = data.draw(
            st.lists(st.sampled_from(self.live), min_size=1, unique_by=lambda r: r.handle)
        )
        for request in batch:
            self.verify(data, request)
        self.sim.propose(batch)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def a_proposal_is_skipped(self, data: st.DataObject) -> None:
        request = self.some(data, lambda r: True)
        self.verify(data, request)
        # What was proposed before is not verified again; the scheduler's next output says so.
        if request.verifying:
            self.sim.trim(request, 0)

    @precondition(lambda self: any(request.verifying for request in self.live))
    @rule(data=st.data())
    def a_proposal_is_trimmed(self, data: st.DataObject) -> None:
        request = self.some(data, lambda r: r.verifying > 0)
        self.sim.trim(request, data.draw(st.integers(0, request.verifying - 1)))

    @precondition(lambda self: any(request.over for request in self.sim.requests.values()))
    @rule()
    def ended_requests_finish(self) -> None:
        self.sim.finish([request for request in self.sim.requests.values() if request.over])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def a_request_is_aborted(self, data: st.DataObject) -> None:
        self.sim.finish([self.some(data, lambda r: True)])

    @rule(lucky=st.integers(0, 7))
    def an_epoch_ends(self, lucky: int) -> None:
        if lucky == 0:  # seldom: it leaves nothing to go wrong
            self.sim.resync()

    # ---- the line and the draft

    @rule(frames=st.integers(1, 3))
    def the_draft_receives(self, frames: int) -> None:
        self.sim.draft_receives(frames)

    @rule(frames=st.integers(1, 3))
    def the_target_receives(self, frames: int) -> None:
        self.sim.target_receives(frames)

    @rule(steps=st.integers(1, 3))
    def the_draft_decodes(self, steps: int) -> None:
        self.sim.draft_steps(steps)

    @rule()
    def everything_arrives(self) -> None:
        self.sim.deliver()

    @rule()
    def the_draft_comes_to_rest(self) -> None:
        self.sim.settle()
        check_at_rest(self.sim)

    # ---- what must hold

    @invariant()
    def trees_rows_and_blocks_are_sound(self) -> None:
        check_always(self.sim)

    @invariant()
    def proposals_are_the_models_own_continuations(self) -> None:
        for request in self.live:
            if request.told == len(request.text):
                count = len(request.proposed)
                assert request.proposed == self.sim.greedy(request, count)

    def teardown(self) -> None:
        if not hasattr(self, "sim"):
            return
        self.sim.settle()
        check_always(self.sim)
        check_at_rest(self.sim)
        self.sim.finish(list(self.sim.requests.values()))
        self.sim.settle()
        check_blocks(self.sim)
        assert self.sim.blocks.free_count == self.sim.sizes.num_blocks - 1
        assert self.sim.rows.free_count == self.sim.sizes.max_rows
        assert not self.sim.published.cache.trees


def _run(examples: int, steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        TargetAndDraft,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_trees_are_exact_and_resources_balance_whatever_happens() -> None:
    _run(examples=60, steps=40)


@pytest.mark.slow
def test_trees_are_exact_and_resources_balance_in_long_lives() -> None:
    _run(examples=1500, steps=100)
