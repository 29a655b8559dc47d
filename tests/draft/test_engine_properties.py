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
from vllm_ssd.core.forks import geometric_fan_out
from vllm_ssd.target.requests import Tracked, most_drafts

MAX_REQUESTS = 4
MAX_LENGTH = 48
ALL = 1000
OPENING = [token % 7 for token in range(3, 30, 2)]
"""The beginning of many prompts, so that they share KV."""


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    """Anything from plenty to far too little."""
    depth = draw(st.integers(1, 4))
    each = st.integers(1, 4)
    fan_out = draw(
        each.map(lambda count: (count,) * (depth + 1))
        | each.map(lambda count: geometric_fan_out(depth, count, 0.7, 1.0))
        | st.none()
        | st.lists(st.integers(0, 4), min_size=depth + 1, max_size=depth + 1).filter(any).map(tuple)
    )
    return Sizes(
        depth=depth,
        fan_out=fan_out,
        branches=draw(st.sampled_from([0, 0, 0, 1, 2, 5])),
        vocab_size=8,
        num_blocks=draw(st.sampled_from([400, 400, 60, 40, 24, 12, 4])),
        block_size=draw(st.sampled_from([4, 2, 3, 8])),
        max_rows=draw(st.sampled_from([64, 64, 32, 16, 8, 4, 1])),
        max_length=MAX_LENGTH,
        prefill_chunk=draw(st.integers(1, 6)),
        prefill_chunk_idle=draw(st.integers(6, 20)),
        caching=draw(st.booleans()),
        sampling=draw(st.sampled_from(["probabilistic", "auto", "greedy"])),
        saguaro_c=draw(st.sampled_from([1.0, 1.0, -1.0, 0.0, 0.4])),
    )


def doubts(position: int) -> float:
    """Some positions are certain, some doubtful: forks are chosen anew when more are known."""
    return (0.1, 0.97, 0.5, 0.99)[position * 7 % 11 % 4]


prompts = st.builds(
    lambda shared, tail: OPENING[:shared] + tail,
    st.integers(0, len(OPENING)),
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
)
others: st.SearchStrategy[list[int]] = st.lists(st.integers(0, 7), max_size=4) | st.just([])
"""Tokens that the draft has not chosen."""
time_passing = st.fixed_dictionaries(
    {
        # Mostly enough: without hits little would be tested.
        "draft_receives": st.sampled_from([ALL, ALL, ALL, ALL, 1, 0]),
        "steps": st.sampled_from([ALL, ALL, ALL, 5, 2, 1, 0]),
        "target_receives": st.sampled_from([ALL, ALL, ALL, ALL, 1, 0]),
    }
)
"""How far messages and drafting get before the target does the next thing."""


class TargetAndDraft(RuleBasedStateMachine):
    """Everything a target may do, in any order, with messages that take their time.

    Every rule lets time pass in the end: as rules of their own, messages and draft steps would be
    too rare for hits.
    """

    @initialize(its_sizes=sizes(), prompt=prompts)
    def begin(self, its_sizes: Sizes, prompt: list[int]) -> None:
        self.sim = Simulation(its_sizes)
        self.sim.model.confidence_at = doubts
        guard_writes(self.sim)
        self.sim.start(prompt)

    @property
    def live(self) -> list[TargetRequest]:
        return [request for request in self.sim.requests.values() if not request.over]

    def time_passes(self, draft_receives: int, steps: int, target_receives: int) -> None:
        self.sim.draft_receives(draft_receives)
        self.sim.draft_steps(steps)
        self.sim.target_receives(target_receives)

    def some(self, data: st.DataObject, which: Callable[[TargetRequest], bool]) -> TargetRequest:
        return data.draw(st.sampled_from([r for r in self.live if which(r)]), label="request")

    def verify(self, data: st.DataObject, request: TargetRequest) -> None:
        """One verification: some proposed tokens are accepted, then comes a token."""
        rejected = data.draw(st.integers(0, request.verifying), label="rejected")
        accepted = request.verifying - rejected
        text = request.text + request.proposed[:accepted]
        refused = request.proposed[accepted : accepted + 1] if rejected else []
        possible = [token for token in self.sim.best(text) if token not in refused]
        # The draft's better candidates more often than the others.
        rank = data.draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3, 7]), label="rank")
        self.sim.confirm(request, accepted, possible[min(rank, len(possible) - 1)])

    # ---- the target

    @precondition(lambda self: len(self.sim.requests) < MAX_REQUESTS)
    @rule(
        prompt=prompts,
        max_tokens=st.sampled_from([40, 12, 3, 1]),
        stop=st.sampled_from([[], [0], [1, 4]]),
        sampling=st.sampled_from(
            [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.6, 3, 1.0), (1.4, 0, 0.793), (0.9, 1, 0.5)]
        ),
        time=time_passing,
    )
    def a_request_arrives(
        self,
        prompt: list[int],
        max_tokens: int,
        stop: list[int],
        sampling: tuple[float, int, float],
        time: dict[str, int],
    ) -> None:
        self.sim.start(prompt, max_tokens, stop, *sampling)
        self.time_passes(**time)

    @precondition(lambda self: self.live)
    @rule(
        data=st.data(),
        rounds=st.lists(time_passing, min_size=1, max_size=6),
        # Speculation is off in some of these rounds, or none.
        off=st.sets(st.integers(0, 5), max_size=4) | st.just(set()),
    )
    def batches_are_verified(
        self, data: st.DataObject, rounds: list[dict[str, int]], off: set[int]
    ) -> None:
        for number, time in enumerate(rounds):
            batch = data.draw(st.sets(st.sampled_from(range(MAX_REQUESTS)), max_size=2))
            left_out = [self.live[i] for i in batch if i < len(self.live) - 1]
            verified = [request for request in self.live if request not in left_out]
            for request in verified:
                self.verify(data, request)
            if verified:
                self.sim.propose(verified, speculate=number not in off)
            self.time_passes(**time)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), waiting=time_passing, time=time_passing)
    def the_target_waits(
        self, data: st.DataObject, waiting: dict[str, int], time: dict[str, int]
    ) -> None:
        verified = self.live
        for request in verified:
            self.verify(data, request)
        live = [request for request in verified if not request.over]
        waits = [request for request in live if data.draw(st.booleans(), label="waits")]
        more = {request.handle: data.draw(others, label="more") for request in live[:1]}
        more = {handle: self.allowed(handle, tokens) for handle, tokens in more.items()}
        self.sim.propose(verified, waits, more)
        self.time_passes(**waiting)
        check_always(self.sim)
        proposals: dict[int, list[int]] = {}
        for request in waits:
            tracked = Tracked(request.handle, request.told, request.limit)
            wanted = most_drafts(tracked, len(request.text), self.sim.sizes.depth)
            found = [t for t in self.sim.look_up(request).drafted if t not in request.stop]
            kept = data.draw(st.sampled_from([ALL, ALL, 2, 1, 0]), label="kept")
            tokens = [*found[:kept], *data.draw(others, label="others")]
            proposals[request.handle] = self.allowed(request.handle, tokens)[: max(0, wanted)]
        if proposals:
            self.sim.decide(proposals)
        self.time_passes(**time)

    def allowed(self, handle: int, tokens: list[int]) -> list[int]:
        """Without end tokens, which are never proposed."""
        return [token for token in tokens if token not in self.sim.requests[handle].stop]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), time=time_passing)
    def a_proposal_is_skipped(self, data: st.DataObject, time: dict[str, int]) -> None:
        request = self.some(data, lambda r: True)
        self.verify(data, request)
        # What was proposed before is not verified again; the scheduler's next output says so.
        if request.verifying:
            self.sim.trim(request, 0)
        self.time_passes(**time)

    @precondition(lambda self: any(request.verifying for request in self.live))
    @rule(data=st.data(), time=time_passing)
    def a_proposal_is_trimmed(self, data: st.DataObject, time: dict[str, int]) -> None:
        request = self.some(data, lambda r: r.verifying > 0)
        self.sim.trim(request, data.draw(st.integers(0, request.verifying - 1)))
        self.time_passes(**time)

    @precondition(lambda self: any(request.over for request in self.sim.requests.values()))
    @rule(time=time_passing)
    def ended_requests_finish(self, time: dict[str, int]) -> None:
        self.sim.finish([request for request in self.sim.requests.values() if request.over])
        self.time_passes(**time)

    @precondition(lambda self: len(self.live) > 1)
    @rule(data=st.data(), time=time_passing)
    def a_request_is_aborted(self, data: st.DataObject, time: dict[str, int]) -> None:
        self.sim.finish([self.some(data, lambda r: True)])
        self.time_passes(**time)

    @rule(time=time_passing, lucky=st.integers(0, 3))
    def an_epoch_ends(self, time: dict[str, int], lucky: int) -> None:
        if lucky == 0:  # seldom: it clears all state
            self.sim.resync()
        self.time_passes(**time)

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
            if request.told == len(request.text) and not request.temperature:
                for at, token in enumerate(request.proposed):
                    text = request.text + request.proposed[:at]
                    own = self.sim.best(text)[0]
                    assert token == own or request.follows([*text, token])

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
    run_state_machine_as_test(
        TargetAndDraft,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_trees_are_exact_and_resources_balance_whatever_happens() -> None:
    _run(examples=20, steps=20)


@pytest.mark.slow
def test_trees_are_exact_and_resources_balance_in_long_runs() -> None:
    _run(examples=500, steps=50)
