"""One round after the other: what is guessed, what hits, where branches end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.draft.invariants import check_always, check_at_rest, guard_writes, paths
from tests.draft.simulation import Simulation, Sizes, TargetRequest
from vllm_ssd.core.tree import Where
from vllm_ssd.draft.session import OutOfStepError
from vllm_ssd.wire.messages import Verified
from vllm_ssd.wire.packing import pack

PROMPT = [1, 2, 3, 4, 5, 6]


def at_rest(
    sizes: Sizes = Sizes(),  # noqa: B008 (immutable)
    confidence: float = 0.5,
) -> tuple[Simulation, TargetRequest]:
    """One request whose first outcomes have been guessed to the full depth."""
    sim = Simulation(sizes)
    sim.model.confidence_at = lambda position: confidence
    guard_writes(sim)
    request = sim.start(PROMPT)
    sim.settle()
    return sim, request


def verified_once(
    sizes: Sizes = Sizes(),  # noqa: B008
    confidence: float = 0.5,
) -> tuple[Simulation, TargetRequest]:
    """The same with a full proposal being verified, everything guessed."""
    sim, request = at_rest(sizes, confidence)
    sim.verify(request, 0, sim.greedy(request, 1)[0])
    sim.settle()
    return sim, request


def forks_of(sim: Simulation, request: TargetRequest) -> dict[int, list[int]]:
    """The guessed tokens after each k."""
    cache = sim.published.cache
    guessed: dict[int, list[int]] = {}
    for key in paths(cache, cache.trees[request.handle]):
        if key:
            guessed.setdefault(key[0], []).append(key[1])
    return guessed


def text_after(sim: Simulation, request: TargetRequest, k: int) -> list[int]:
    """The text if ``k`` of the proposed tokens are accepted."""
    return request.text + request.proposed[:k]


# ---- hits


def test_a_hit_returns_the_branch_of_the_outcome() -> None:
    sim, request = verified_once()
    # The second token is rejected; the target goes on with the draft's second choice there.
    token = sim.best(text_after(sim, request, 1))[1]
    proposed = sim.verify(request, 1, token)
    assert proposed == sim.greedy(request, sim.sizes.depth)


def test_the_first_outcome_is_guessed_from_the_prompt_alone() -> None:
    sim, request = at_rest()
    token = sim.best(PROMPT)[3]
    assert sim.verify(request, 0, token) == sim.greedy(request, sim.sizes.depth)


def test_a_draft_that_is_the_target_hits_every_time_with_full_depth() -> None:
    sim, request = at_rest()
    for _ in range(8):
        bonus = sim.greedy(request, request.verifying + 1)[-1]
        proposed = sim.verify(request, request.verifying, bonus)
        assert proposed == sim.greedy(request, sim.sizes.depth)
        sim.settle()
    # The trunk never had to be prefilled again.
    assert sim.session.counters["draft_prefill_tokens"] == len(PROMPT)


@given(st.data())
def test_every_guessed_outcome_hits_with_full_depth(data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, 4), label="depth")
    fan_out = data.draw(st.integers(1, 3), label="fan_out")
    sim, request = at_rest(Sizes(depth=depth, fan_out=(fan_out,) * (depth + 1)))
    for _ in range(4):
        guessed = forks_of(sim, request)
        k = data.draw(st.integers(0, request.verifying), label="accepted")
        candidates = guessed.get(k, [])
        if k == request.verifying:
            candidates = [*candidates, sim.best(text_after(sim, request, k))[0]]
        proposed = sim.verify(request, k, data.draw(st.sampled_from(candidates), label="token"))
        assert proposed == sim.greedy(request, depth)
        sim.settle()


def test_an_unguessed_outcome_is_a_miss_and_the_next_one_hits_again() -> None:
    sim, request = verified_once()
    assert sim.verify(request, 0, sim.best(request.text)[-1]) == []
    sim.settle()
    assert sim.verify(request, 0, sim.best(request.text)[1]) == sim.greedy(request, 3)


def test_a_step_must_find_the_choices_after_a_miss_whatever_is_proposed() -> None:
    sim, request = verified_once()
    there = sim.session.share.requests[request.handle]
    assert there.prepared
    sim.confirm(request, 0, sim.best(request.text)[-1])
    sim.propose([request], more={request.handle: [1, 2]})
    sim.settle()
    assert there.verified == 2
    assert not there.prepared
    sim.verify(request, 0, sim.best(request.text)[1])
    sim.settle()
    assert there.prepared


def test_a_half_drafted_branch_is_a_shorter_draft() -> None:
    sim, request = at_rest()
    sim.verify(request, 0, sim.greedy(request, 1)[0])
    sim.deliver()
    sim.draft_steps(2)
    sim.target_receives(2)
    token = sim.best(request.text)[1]
    sim.confirm(request, 0, token)
    sim.propose([request])
    assert request.proposed == sim.greedy(request, 2)


def test_the_target_may_be_two_rounds_ahead_of_the_draft() -> None:
    sim, request = verified_once()
    # Neither outcome reaches the draft; its old tree still holds the text.
    first = sim.verify(request, 1, request.proposed[1])
    assert first == sim.greedy(request, len(first))
    second = sim.verify(request, 1, first[1])
    assert second == sim.greedy(request, len(second))
    assert len(second) > 0
    sim.settle()
    check_always(sim)
    check_at_rest(sim)


# ---- what is guessed


def test_after_a_prompt_the_whole_budget_is_at_k_0() -> None:
    sim, request = at_rest()
    # The trunk is the first choice; the forks are the next ones, best first.
    budget = sim.sizes.max_branches
    assert forks_of(sim, request) == {0: sim.best(PROMPT)[1:budget]}


def test_after_an_empty_proposal_the_whole_budget_is_at_k_0() -> None:
    sim, request = verified_once()
    assert sim.verify(request, 0, sim.best(request.text)[-1]) == []
    sim.settle()
    budget = sim.sizes.max_branches
    assert forks_of(sim, request) == {0: sim.best(request.text)[1:budget]}


def test_forks_are_the_best_tokens_but_the_drafted_one() -> None:
    sim, request = verified_once(Sizes(fan_out=(3, 2, 1, 2)))
    guessed = forks_of(sim, request)
    for k, count in enumerate([3, 2, 1]):
        best = sim.best(text_after(sim, request, k))
        assert best[0] == request.proposed[k]
        assert guessed[k] == best[1 : 1 + count]
    # After all of them the trunk itself is the first choice.
    assert guessed[3] == sim.best(text_after(sim, request, 3))[1:2]


def test_end_tokens_are_not_guessed() -> None:
    sim = Simulation()
    stop = sim.best(PROMPT)[2]
    request = sim.start(PROMPT, stop=[stop])
    sim.settle()
    guessed = forks_of(sim, request)[0]
    best = [token for token in sim.best(PROMPT) if token != stop]
    assert guessed == best[1 : sim.sizes.max_branches]


def test_branches_bounds_the_rows_likeliest_outcomes_first() -> None:
    sim, request = verified_once(Sizes(branches=4), confidence=0.9)
    cache = sim.published.cache
    # All accepted, then a rejection, the earlier the likelier; then the second choice of one.
    assert len(paths(cache, cache.trees[request.handle])) == 4
    assert {k: len(tokens) for k, tokens in forks_of(sim, request).items()} == {0: 1, 1: 1, 2: 1}
    alone, single = at_rest(Sizes(branches=1))
    assert forks_of(alone, single) == {}


def test_the_trunk_counts_as_a_branch_even_if_its_own_outcome_is_unlikely() -> None:
    branches = 4
    sim = Simulation(Sizes(branches=branches))
    for number in range(60):  # hardly anything is accepted
        request = sim.start([number % 12, *PROMPT])
        for rank in (0, 1, 1, 1):
            sim.settle()
            sim.verify(request, 0, sim.best(request.text)[rank])
        sim.finish([request])
    requests = [sim.start([number, *PROMPT]) for number in range(4)]
    sim.settle()
    for request in requests:
        sim.verify(request, 0, sim.greedy(request, 1)[0])
    sim.settle()
    cache = sim.published.cache
    for request in requests:
        assert request.proposed
        assert len(paths(cache, cache.trees[request.handle])) == branches


def test_branches_go_to_where_the_draft_is_in_doubt() -> None:
    sim = Simulation(Sizes(branches=2))
    doubted = -1
    """Which of the tokens after the prompt's first."""
    sim.model.confidence_at = lambda at: 0.1 if at == len(PROMPT) + 1 + doubted else 0.9

    def rejected_at(k: int) -> dict[int, int]:
        """How many forks there are after each number of tokens, when the k-th is in doubt."""
        nonlocal doubted
        doubted = k
        request = sim.start(PROMPT)
        sim.settle()
        sim.verify(request, 0, sim.greedy(request, 1)[0])
        sim.settle()
        guessed = {k: len(tokens) for k, tokens in forks_of(sim, request).items()}
        # It is right to doubt this one, and only this one.
        sim.verify(request, k, sim.best(text_after(sim, request, k))[1])
        sim.finish([request])
        sim.settle()
        return guessed

    for number in range(30):
        rejected_at(number % 3)
    assert [rejected_at(k) for k in (0, 1, 2)] == [{0: 1}, {1: 1}, {2: 1}]


def test_a_doubtful_position_gets_forks_once_its_choices_are_known() -> None:
    sim, request = at_rest(Sizes(fan_out=None, branches=4), confidence=0.97)
    sim.verify(request, 0, sim.best(PROMPT)[1])
    sim.deliver()
    sim.draft_steps(2)
    sim.target_receives(2)
    # All that is known is proposed, so the choices after it are not known at the first look.
    assert len(sim.verify(request, 0, sim.best(request.text)[1])) == 2
    end = len(request.text) + 2
    sim.model.confidence_at = lambda position: 0.1 if position == end else 0.97
    sim.settle()
    guessed = forks_of(sim, request)
    assert len(guessed[2]) >= 2
    assert sum(len(tokens) for tokens in guessed.values()) == 3


# ---- where branches end


def test_a_branch_ends_at_its_end_token() -> None:
    sim = Simulation()
    first, second, stop = sim.greedy(sim.start(PROMPT), 3)
    sim = Simulation()
    request = sim.start(PROMPT, stop=[stop])
    sim.settle()
    # The end token itself is left to the target: the same verification yields it.
    assert sim.verify(request, 0, first) == [second]
    sim.settle()
    cache = sim.published.cache
    assert cache.ended[cache.trees[request.handle].trunk]
    assert set(forks_of(sim, request)) == {0, 1}
    assert stop not in forks_of(sim, request)[1]


def test_a_branch_ends_at_the_length_limit() -> None:
    sim = Simulation()
    # Five new tokens: the last comes from the target itself, so four can be drafted.
    request = sim.start(PROMPT, max_tokens=5)
    sim.settle()
    lengths = []
    while not request.over:
        token = sim.best(request.text)[1]
        lengths.append(len(sim.verify(request, 0, token)))
        sim.settle()
    assert lengths == [3, 2, 1, 0, 0]
    assert len(request.text) == len(PROMPT) + 5


def test_a_request_with_nothing_left_to_draft_holds_nothing() -> None:
    sim = Simulation()
    request = sim.start(PROMPT, max_tokens=1)
    sim.settle()
    assert sim.model.forwards == 0
    assert request.handle not in sim.published.cache.trees
    assert sim.rows.free_count == sim.sizes.max_rows


# ---- what the scheduler does to proposals


def test_outcomes_beyond_a_trimmed_proposal_are_not_drafted_any_more() -> None:
    sim, request = at_rest()
    sim.verify(request, 0, sim.greedy(request, 1)[0])
    sim.trim(request, 1)
    sim.settle()
    lengths = {
        key: len(branch)
        for key, branch in paths(
            sim.published.cache, sim.published.cache.trees[request.handle]
        ).items()
        if key
    }
    assert {length for (k, _), length in lengths.items() if k <= 1} == {4}
    assert not [k for k, _ in lengths if k > 1]
    # Their rows and blocks are free again, or went to outcomes that can happen.
    check_always(sim)


def test_a_tree_is_complete_when_the_outcomes_still_to_be_guessed_are_trimmed_away() -> None:
    sim, request = at_rest()
    sim.verify(request, 0, sim.best(PROMPT)[1])
    sim.deliver()
    sim.draft_steps(2)
    sim.target_receives(2)
    # All that is known is proposed, so what follows all of it cannot be guessed yet.
    assert len(sim.verify(request, 0, sim.best(request.text)[1])) == 2
    sim.deliver()
    tree = sim.published.cache.trees[request.handle]
    assert not tree.complete
    sim.trim(request, 1)
    sim.deliver()
    assert tree.complete


def test_a_stopped_branch_that_is_hit_goes_on_where_it_stopped() -> None:
    sim, request = at_rest()
    sim.verify(request, 0, sim.greedy(request, 1)[0])
    sim.trim(request, 1)
    sim.deliver()
    # One proposal is skipped, so that two verifications arrive as one outcome.
    sim.confirm(request, 1, request.proposed[1])
    sim.trim(request, 0)
    sim.verify(request, 0, sim.best(request.text)[1])
    sim.settle()
    check_always(sim)
    check_at_rest(sim)
    assert sim.verify(request, 0, sim.best(request.text)[0]) == sim.greedy(request, 3)


# ---- out of step


@pytest.mark.parametrize(
    ("handle", "length", "confirmed", "tokens"),
    [(9, 6, 1, [1]), (0, 5, 1, [1]), (0, 7, 1, [1]), (0, 6, 2, [1])],
    ids=["unknown request", "text shrank", "text missed", "tokens missing"],
)
def test_outcomes_that_do_not_fit_the_known_text_are_out_of_step(
    handle: int, length: int, confirmed: int, tokens: list[int]
) -> None:
    sim, _ = at_rest()
    message = Verified(
        pack([handle]), pack([length]), pack([confirmed]), pack([0]), pack(tokens), 0
    )
    with pytest.raises(OutOfStepError):
        sim.session.verified(message)
    sim.session.reset()
    assert sim.rows.free_count == sim.sizes.max_rows
    assert not np.any(sim.rows.pending)


def test_a_request_twice_in_one_verification_is_out_of_step() -> None:
    sim, request = at_rest()
    message = Verified(pack([0, 0]), pack([6, 6]), pack([1, 1]), pack([0, 0]), pack([1, 1]), 0)
    with pytest.raises(OutOfStepError):
        sim.session.verified(message)
    assert sim.session.share.requests[request.handle].length == len(PROMPT)


def test_an_unguessed_text_is_pending_only_while_the_draft_is_at_work() -> None:
    sim, request = at_rest()
    request.text.append(sim.best(PROMPT)[-1])
    assert sim.look_up(request).where is Where.OFF
    other = sim.start(PROMPT[:3])
    sim.deliver()
    other.text.append(sim.best(other.text)[-1])
    assert sim.look_up(other).where is Where.PENDING


# ---- what is learned and counted


def test_outcomes_that_keep_coming_are_guessed() -> None:
    sim, request = verified_once(Sizes(branches=4), confidence=0.9)
    assert sim.best(request.text)[2] not in forks_of(sim, request)[0]

    def surprises(rounds: int) -> list[bool]:
        """Whether the draft guesses that its first token is rejected for its third choice."""
        request = sim.start(PROMPT)
        sim.settle()
        hits = []
        for _ in range(rounds):
            third = sim.best(request.text)[2]
            verifying = bool(request.proposed)
            hit = bool(sim.verify(request, 0, third))
            sim.settle()
            if verifying:
                hits.append(hit)
        sim.finish([request])
        sim.settle()
        return hits

    for _ in range(30):
        surprises(8)
    assert all(surprises(4))


def test_a_trunk_follows_a_proposal_that_it_has_lost() -> None:
    sim, request = verified_once()
    sim.confirm(request, 1, sim.best(text_after(sim, request, 1))[1])
    sim.propose([request])
    # The draft has given up the branch that the target proposes.
    [held] = sim.session.share.requests.values()
    while held.forks:
        sim.engine.allocator.prune(held, list(held.forks))
    sim.settle()
    assert request.verifying == held.verified == 3
    check_always(sim)
    check_at_rest(sim)
    before = sim.session._rounds._outcomes.acceptance
    sim.verify(request, 0, sim.best(request.text)[1])
    sim.settle()
    assert sim.session._rounds._outcomes.acceptance < before


def test_a_round_is_counted_whether_it_is_finished_or_cut_off() -> None:
    sim, request = verified_once()
    counters = sim.session.share.counters
    assert (counters["draft_rounds"], counters["draft_rounds_cut"]) == (1, 0)
    for _ in range(2):
        sim.verify(request, 0, sim.best(request.text)[1])
        sim.deliver()
        sim.draft_steps(1)
        sim.target_receives(9)
    assert (counters["draft_rounds"], counters["draft_rounds_cut"]) == (2, 1)
    sim.settle()
    assert (counters["draft_rounds"], counters["draft_rounds_cut"]) == (3, 1)
    assert counters["draft_round_seconds"] > 0.0


def test_a_round_ends_with_the_last_request_it_was_for() -> None:
    sim, request = verified_once()
    sim.verify(request, 0, sim.best(request.text)[1])
    sim.deliver()
    assert sim.engine.has_work
    sim.finish([request])
    sim.deliver()
    counters = sim.session.share.counters
    assert (counters["draft_rounds"], counters["draft_rounds_cut"]) == (2, 0)


def test_steps_that_replayed_a_graph_are_counted() -> None:
    """Those of the engine, as the model counts them, since the target has joined."""
    sim, request = verified_once()
    assert sim.session.counters["draft_graph_steps"] == 0
    sim.model.graph_steps += 7
    sim.verify(request, 0, sim.best(request.text)[1])
    sim.settle()
    assert sim.session.counters["draft_graph_steps"] == 7
