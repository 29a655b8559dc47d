"""A token is sampled once and kept; what is guessed to follow an outcome is the likeliest."""

from __future__ import annotations

import numpy as np
import pytest

from tests.draft.invariants import check_always, paths
from tests.draft.simulation import Simulation, Sizes, TargetRequest
from vllm_ssd.core.arms import BLOCK

PROMPT = [1, 2, 3, 4, 5, 6]
SIZES = Sizes(vocab_size=12, sampled_from=10)


def at_rest(sizes: Sizes = SIZES, seed: int = 0) -> tuple[Simulation, TargetRequest]:
    """One request whose first outcomes have been guessed to the full depth."""
    sim = Simulation(sizes)
    sim.model.random = np.random.default_rng(seed)
    sim.model.confidence_at = lambda position: 0.3
    request = sim.start(PROMPT, temperature=1.3)
    sim.settle()
    return sim, request


def trunk(sim: Simulation, request: TargetRequest) -> list[int]:
    """What the published trunk holds after the confirmed text."""
    cache = sim.published.cache
    return cache.row_tokens(cache.trees[request.handle].trunk)


def certain(sim: Simulation, request: TargetRequest) -> list[int]:
    """At which indices the trunk's token is certain."""
    tree = sim.published.cache.trees[request.handle]
    count = len(trunk(sim, request))
    return [i for i in range(count) if (tree.trunk, tree.base + i) not in sim.drawn_from]


@pytest.mark.parametrize("lookahead", [False, True])
def test_the_guess_of_the_bonus_token_is_the_likeliest_and_all_others_are_samples(
    lookahead: bool,
) -> None:
    guesses = unlikely = 0
    for seed in range(20):
        sim, request = at_rest(SIZES._replace(lookahead=lookahead), seed)
        assert certain(sim, request) == [0]
        assert trunk(sim, request)[0] == sim.best(PROMPT)[0]
        # A hit on a fork: its tokens are proposed, and the trunk goes on after them.
        sim.verify(request, 0, sim.best(PROMPT)[1])
        n = len(request.proposed)
        assert n == sim.sizes.depth
        sim.settle()
        check_always(sim)
        assert certain(sim, request) == [n]
        drafted = trunk(sim, request)
        text = request.text + drafted[:n]
        assert drafted[n] == sim.best(text)[0]
        guesses += 1
        unlikely += drafted[n + 1] != sim.best([*text, drafted[n]])[0]
    assert 0 < unlikely < guesses


def test_a_trunk_that_rests_goes_on_with_the_sample_it_keeps() -> None:
    different = 0
    for seed in range(20):
        sim, request = at_rest(seed=seed)
        # It has fed its last token: the sample after that is drawn, and not published yet.
        row = sim.published.cache.trees[request.handle].trunk
        held = sim.rows.sampled._kept[row], sim.rows.sampled._kept_q[row].copy()
        drafted = trunk(sim, request)
        # The trunk's own first token comes: the rest of it is proposed, and one is left over.
        sim.verify(request, 0, drafted[0])
        sim.trim(request, 1)
        sim.deliver()
        grown = trunk(sim, request)
        end = len(drafted) - 1
        assert grown[:end] == drafted[1:]
        tree = sim.published.cache.trees[request.handle]
        if grown[end:]:
            q = sim.drawn_from.get((tree.trunk, tree.base + end))
            different += q is None and grown[end] != held[0]
    # After all that was proposed it is a guess, not the sample.
    assert different > 0


def test_beyond_the_guess_a_resting_trunk_grows_by_the_very_sample() -> None:
    sim, request = at_rest()
    sim.verify(request, 0, sim.best(PROMPT)[1])
    sim.settle()
    cache = sim.published.cache
    row = cache.trees[request.handle].trunk
    kept, q = int(sim.rows.sampled._kept[row]), sim.rows.sampled._kept_q[row].copy()
    drafted = trunk(sim, request)
    # Two accepted out of three and, by chance, the trunk's own third token: it holds more than is
    # proposed, so the guess lies within it.
    sim.trim(request, 2)
    sim.verify(request, 2, drafted[2])
    assert request.proposed == drafted[3 : 3 + sim.sizes.depth]
    sim.draft_receives(9)
    sim.target_receives(9)
    grown = trunk(sim, request)
    at = len(drafted) - 3
    assert grown[:at] == drafted[3:]
    assert len(request.proposed) < at
    assert grown[at] == kept
    held = sim.drawn_from[row, cache.trees[request.handle].base + at]
    assert sorted(held.values()) == sorted(q[q > 0.0].tolist())
    check_always(sim)


def test_the_same_text_may_go_on_differently_elsewhere() -> None:
    sim = Simulation(SIZES)
    sim.model.confidence_at = lambda position: 0.3
    requests = [sim.start(PROMPT, temperature=1.0) for _ in range(12)]
    sim.settle()
    assert len({tuple(trunk(sim, request)) for request in requests}) > 3
    assert len({trunk(sim, request)[0] for request in requests}) == 1


def test_no_fork_begins_with_the_token_that_it_would_follow_the_rejection_of() -> None:
    first_choices = 0
    for seed in range(20):
        sim, request = at_rest(seed=seed)
        sim.verify(request, 0, sim.best(PROMPT)[1])
        sim.settle()
        cache = sim.published.cache
        drafted = trunk(sim, request)
        for key in paths(cache, cache.trees[request.handle]):
            if key and key[0] < len(request.proposed):
                assert key[1] != drafted[key[0]]
                text = request.text + drafted[: key[0]]
                first_choices += key[1] == sim.best(text)[0]
    # Where another one was sampled, the first choice is the likeliest to come instead.
    assert first_choices > 10


def test_greedy_requests_beside_sampled_ones_are_as_alone() -> None:
    alone, beside = Simulation(SIZES), Simulation(SIZES)
    request = alone.start(PROMPT)
    beside.start([7, 8], temperature=1.0)
    other = beside.start(PROMPT)
    for sim, one in ((alone, request), (beside, other)):
        sim.settle()
        sim.verify(one, 0, sim.best(PROMPT)[1])
        sim.settle()
        check_always(sim)
        assert trunk(sim, one) == sim.greedy(one, len(trunk(sim, one)))
    assert other.proposed == request.proposed


# ---- arms


def test_requests_change_their_arm_after_a_block_and_it_is_counted() -> None:
    sim = Simulation(SIZES._replace(sampling="auto", max_length=400, num_blocks=2000))
    sim.verify_us = 10_000
    rng = np.random.default_rng(0)
    requests = [sim.start(PROMPT, 300, temperature=0.7) for _ in range(2)]
    greedy = sim.start(PROMPT, 300)
    for _ in range(3 * BLOCK):
        sim.settle()
        for request in (*requests, greedy):
            best = sim.best(request.text)
            drafted = request.proposed[:1]
            accepted = int(bool(drafted) and rng.random() < 0.5)
            after = sim.best(request.text + drafted)[0] if accepted else best[0]
            if not accepted and drafted == [after]:
                after = best[1]
            sim.confirm(request, accepted, after)
        sim.propose([*requests, greedy])
    counters = sim.session.counters
    used = [counters[f"draft_arm_{name}_verifications"] for name in ("greedy", "c_1")]
    assert min(used) > 0
    assert sum(used) <= 2 * 3 * BLOCK  # the greedy request has no arm
    seconds = sum(counters[f"draft_arm_{name}_seconds"] for name in ("greedy", "c_1"))
    assert seconds == pytest.approx(0.01 * sum(used))


def test_under_the_greedy_arm_nothing_is_sampled() -> None:
    sim, request = at_rest(SIZES._replace(sampling="greedy"))
    assert trunk(sim, request) == sim.greedy(request, len(trunk(sim, request)))
    assert not sim.drawn_from


# ---- Saguaro's C


def test_weighed_tokens_are_sampled_less_and_forked_more() -> None:
    weighed_drafts = drafts = weighed_forks = forks = 0
    sim = Simulation(SIZES._replace(saguaro_c=0.0, fan_out=None, branches=6, max_length=60))
    sim.model.confidence_at = lambda position: 0.4
    rng = np.random.default_rng(0)
    for number in range(60):
        request = sim.start([number % 12, *PROMPT], 40, temperature=1.0)
        for _ in range(6):
            sim.settle()
            # The target is the draft itself: what is rejected becomes one of the likeliest.
            accepted = 0
            token = sim.best(request.text)[int(rng.integers(0, 2))]
            if request.proposed[:1] == [token]:
                token = sim.best(request.text)[2]
            sim.verify(request, accepted, token)
        sim.settle()
        row = sim.cache.trees[request.handle].trunk
        counts = sim.rows.sampled.weighed[row]
        for k, token in enumerate(request.proposed):
            weighed = sim.best(request.text + request.proposed[:k])[: counts[k]]
            drafts += 1
            weighed_drafts += token in weighed
            cache = sim.published.cache
            for key in paths(cache, cache.trees[request.handle]):
                if key and key[0] == k:
                    forks += 1
                    weighed_forks += key[1] in weighed
        sim.finish([request])
    assert drafts > 100
    assert weighed_drafts == 0
    assert forks > 100
    assert weighed_forks > 0.7 * forks
