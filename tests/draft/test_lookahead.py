"""A step launched while the one before is under way changes when things are known, not what."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import initialize, run_state_machine_as_test

from tests.draft.invariants import Paths, check_always, check_at_rest, guard_writes, paths
from tests.draft.simulation import Simulation, Sizes, TargetRequest
from tests.draft.test_engine_properties import TargetAndDraft, doubts, sizes
from tests.draft.test_engine_properties import prompts as some_prompts
from tests.draft.toy_model import LookaheadToyModel, greedy
from vllm_ssd.wire.messages import Stepped, Trimmed
from vllm_ssd.wire.packing import pack

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class LookingAhead(TargetAndDraft):
    """The same rules, with a model that looks ahead."""

    @initialize(its_sizes=sizes(), prompt=some_prompts)
    def begin(self, its_sizes: Sizes, prompt: list[int]) -> None:
        self.sim = Simulation(its_sizes._replace(lookahead=True))
        self.sim.model.confidence_at = doubts
        guard_writes(self.sim)
        self.sim.start(prompt)


def test_trees_are_exact_and_resources_balance_with_steps_launched_ahead() -> None:
    run_state_machine_as_test(
        LookingAhead,
        settings=settings(
            max_examples=25,
            stateful_step_count=40,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def _decoding(
    sizes: Sizes = Sizes(lookahead=True),  # noqa: B008 (immutable)
    stop: Sequence[int] = (),
) -> tuple[Simulation, LookaheadToyModel]:
    """A draft that has prefilled the prompt and published its trunk's first token."""
    sim = Simulation(sizes)
    guard_writes(sim)
    model = sim.model
    assert isinstance(model, LookaheadToyModel)
    sim.start(PROMPT, stop=stop)
    sim.draft_receives()
    while not any(isinstance(message, Stepped) for frame in sim.to_target for message in frame):
        assert not model.under_way, "nothing is launched beside a prompt"
        sim.draft_steps()
    return sim, model


def test_a_step_is_published_while_the_next_is_under_way() -> None:
    sim, model = _decoding()
    sim.target_receives(len(sim.to_target))
    for launches in (2, 1):  # the first step launches itself too
        launched = model.forwards
        grown = int(sim.published.cache.length.sum())
        sim.draft_steps()
        sim.target_receives()
        assert model.forwards - launched == launches
        assert len(model.under_way) == 1
        assert int(sim.published.cache.length.sum()) > grown


def test_a_message_settles_the_step_under_way_and_its_result_is_published_first() -> None:
    sim, model = _decoding()
    sim.draft_steps()
    assert len(model.under_way) == 1
    sim.target_receives(len(sim.to_target))
    sim.verify(sim.requests[0], 0, sim.best(PROMPT)[0])
    sim.draft_receives()
    assert not model.under_way
    (frame,) = sim.to_target
    assert isinstance(frame[0], Stepped)
    sim.target_receives()
    check_always(sim)


@pytest.mark.parametrize("settled_before", [False, True])
def test_a_new_epoch_drops_the_step_under_way(settled_before: bool) -> None:
    sim, model = _decoding()
    sim.draft_steps()
    assert len(model.under_way) == 1
    if settled_before:
        sim.session.trimmed(Trimmed(pack([0]), pack([0])))
    sim.session.reset()
    assert not model.under_way
    assert not sim.engine.has_work
    assert sim.session.publications() == []


def test_what_a_step_computed_for_an_ended_row_is_dropped() -> None:
    sizes = Sizes(lookahead=True, fan_out=(0, 0, 0, 1))
    drafted = greedy(PROMPT, sizes.vocab_size, 2)
    sim, model = _decoding(sizes, stop=drafted[1:])
    sim.draft_steps()
    assert sim.cache.ended.any()
    assert len(model.under_way) == 1, "the step launched before the end token was known"
    before = sim.rows.computed.copy()
    sim.settle()
    assert (sim.rows.computed == before).all()
    cache, tree = sim.published.cache, sim.published.cache.trees[0]
    assert cache.row_tokens(tree.trunk) == drafted
    assert cache.ended[tree.trunk]
    check_always(sim)


def _tree(sim: Simulation, request: TargetRequest) -> Paths:
    cache = sim.published.cache
    return paths(cache, cache.trees[request.handle])


def test_the_trees_are_those_without_lookahead() -> None:
    plain, ahead = Simulation(), Simulation(Sizes(lookahead=True))
    both = (plain, ahead)
    for sim in both:
        for shift in range(3):
            sim.start(PROMPT[shift:], stop=[7])
    ranks = (0, 1, 2, 0, 3, 11, 1)
    for round_number, rank in enumerate(ranks):
        for sim in both:
            sim.settle()
            check_always(sim)
            check_at_rest(sim)
        for handle in list(plain.requests):
            requests = [sim.requests[handle] for sim in both]
            assert _tree(plain, requests[0]) == _tree(ahead, requests[1])
            assert requests[0].proposed == requests[1].proposed
        for sim in both:
            live = [request for request in sim.requests.values() if not request.over]
            for request in live:
                accepted = min(request.verifying, (round_number + request.handle) % 4)
                refused = request.proposed[accepted : accepted + 1]
                text = request.text + request.proposed[:accepted]
                choices = [token for token in sim.best(text) if token not in [*refused, 7]]
                sim.confirm(request, accepted, choices[min(rank, len(choices) - 1)])
            sim.propose([request for request in live if not request.over])
            sim.finish([request for request in sim.requests.values() if request.over])
    assert ahead.session.counters["draft_forks"] == plain.session.counters["draft_forks"] > 0
    assert all(sim.published.cache.trees for sim in both)


def test_nothing_is_launched_ahead_while_a_message_waits() -> None:
    sim, model = _decoding()
    sim.engine._pipeline._interrupted = lambda: True
    sim.draft_steps()
    assert not model.under_way
    sim.engine._pipeline._interrupted = lambda: False
    sim.draft_steps()
    assert len(model.under_way) == 1


def test_a_row_given_up_while_a_step_holds_it_is_not_reused_before_that_step() -> None:
    given_up_ahead = 0
    for seed in range(60):
        rng = random.Random(seed)
        max_rows = rng.choice([5, 8, 16])
        sim = Simulation(
            Sizes(
                lookahead=True, fan_out=None, branches=rng.choice([3, 4, 5, 6]), max_rows=max_rows
            )
        )
        guard_writes(sim)
        model = sim.model
        assert isinstance(model, LookaheadToyModel)
        shift = rng.randrange(11)
        model.confidence_at = lambda position, shift=shift: doubts(position + shift)  # type: ignore[misc]
        # Without a step ahead all that is drafted is proposed, and what follows is known later.
        sim.engine._pipeline._interrupted = lambda rng=rng: rng.random() < 0.5  # type: ignore[misc]
        prompts = [[rng.randrange(12) for _ in range(6)] for _ in range(rng.choice([1, 2]))]
        requests = [sim.start(prompt) for prompt in prompts]
        for _ in range(20):
            sim.deliver()
            for _ in range(rng.randrange(5)):
                pruned = sim.session.counters["draft_given_up"]
                sim.draft_steps()
                if model.under_way:
                    given_up_ahead += sim.session.counters["draft_given_up"] > pruned
                sim.target_receives(9)
                check_always(sim)
            live = [request for request in requests if not request.over]
            for request in live:
                accepted = rng.randrange(request.verifying + 1)
                refused = request.proposed[accepted : accepted + 1]
                best = sim.best(request.text + request.proposed[:accepted])
                choices = [token for token in best if token not in refused]
                sim.confirm(request, accepted, choices[rng.choice([0, 0, 1, 2])])
            sim.propose([request for request in live if not request.over])
            sim.finish([request for request in live if request.over])
    assert given_up_ahead > 5
