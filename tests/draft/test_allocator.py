"""Rows and blocks: shared prefixes, prompts beside decoding, idle requests, shortage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.draft.invariants import check_always, check_at_rest, check_blocks, guard_writes, paths
from tests.draft.simulation import Simulation, Sizes, TargetRequest
from vllm_ssd.draft.request import DORMANT
from vllm_ssd.draft.step_plan import chunk_sizes

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def simulation(**sizes: Any) -> Simulation:
    sim = Simulation(Sizes()._replace(**sizes))
    guard_writes(sim)
    return sim


def settle(sim: Simulation) -> None:
    sim.settle()
    check_always(sim)
    check_at_rest(sim)


def trunk_blocks(sim: Simulation, request: TargetRequest) -> list[int]:
    return [block.block_id for block in sim.session.share.requests[request.handle].blocks]


def holds_nothing(sim: Simulation, request: TargetRequest) -> bool:
    return sim.session.share.requests[request.handle].trunk == DORMANT


def prefilled(sim: Simulation) -> float:
    return sim.session.counters["draft_prefill_tokens"]


def hit(sim: Simulation, request: TargetRequest) -> list[int]:
    """The target accepts all and goes on as the draft would."""
    token = sim.greedy(request, request.verifying + 1)[-1]
    return sim.verify(request, request.verifying, token)


def hit_together(sim: Simulation, requests: Sequence[TargetRequest]) -> None:
    """The same for several in one frame."""
    for request in requests:
        sim.confirm(request, request.verifying, sim.greedy(request, request.verifying + 1)[-1])
    sim.propose(requests)


# ---- shared prefixes


def test_a_second_request_with_the_same_beginning_computes_only_its_own_end() -> None:
    sim = simulation()
    first = sim.start(PROMPT)
    settle(sim)
    before = prefilled(sim)
    second = sim.start([*PROMPT[:9], 11, 11])
    settle(sim)
    # Two full blocks of four are the same.
    assert prefilled(sim) - before == 3
    assert trunk_blocks(sim, second)[:2] == trunk_blocks(sim, first)[:2]
    assert trunk_blocks(sim, second)[2] != trunk_blocks(sim, first)[2]


def test_a_prefix_outlives_its_request() -> None:
    sim = simulation()
    sim.finish([sim.start(PROMPT)])
    settle(sim)
    first = sim.start(PROMPT)
    settle(sim)
    sim.finish([first])
    settle(sim)
    before = prefilled(sim)
    sim.start(PROMPT)
    settle(sim)
    assert prefilled(sim) - before == 2


def test_the_last_token_of_a_cached_prompt_is_computed_all_the_same() -> None:
    sim = simulation()
    sim.start(PROMPT[:8])
    settle(sim)
    request = sim.start(PROMPT[:8])
    settle(sim)
    assert hit(sim, request) == sim.greedy(request, 3)


def test_only_verified_tokens_are_shared() -> None:
    sim = simulation()
    request = sim.start(PROMPT)
    settle(sim)
    hit(sim, request)
    settle(sim)
    # The draft has computed two blocks' worth of tokens the target has not confirmed.
    drafted = [*request.text, *sim.greedy(request, 6)]
    before = prefilled(sim)
    sim.start(drafted)
    settle(sim)
    assert prefilled(sim) - before == len(drafted) - len(request.text) // 4 * 4


def test_confirmed_text_is_shared_block_by_block() -> None:
    sim = simulation()
    request = sim.start(PROMPT)
    settle(sim)
    for _ in range(4):
        hit(sim, request)
        settle(sim)
    before = prefilled(sim)
    sim.start([*request.text, 0])
    settle(sim)
    assert prefilled(sim) - before == len(request.text) % 4 + 1


def test_without_prefix_caching_nothing_is_shared() -> None:
    sim = simulation(caching=False)
    first, second = sim.start(PROMPT), sim.start(PROMPT)
    settle(sim)
    assert prefilled(sim) == 2 * len(PROMPT)
    assert not set(trunk_blocks(sim, first)) & set(trunk_blocks(sim, second))


# ---- prompts beside decoding


def test_a_long_prompt_is_prefilled_in_chunks_while_others_go_on_decoding() -> None:
    sim = simulation(prefill_chunk=3)
    running = sim.start(PROMPT[:4])
    settle(sim)
    hit(sim, running)
    sim.start(list(range(11)) * 2)
    sim.deliver()
    cache = sim.published.cache
    trunk = cache.trees[running.handle].trunk
    lengths = []
    for _ in range(3):
        before = prefilled(sim)
        sim.draft_steps()
        sim.target_receives(1)
        assert prefilled(sim) - before == 3
        lengths.append(int(cache.length[trunk]))
    assert lengths == [lengths[0], lengths[0] + 1, lengths[0] + 2]
    settle(sim)


def test_a_prompt_alone_is_prefilled_in_larger_chunks() -> None:
    sim = simulation(prefill_chunk=3, prefill_chunk_idle=16)
    sim.start(list(range(11)) * 2)
    sim.deliver()
    sim.draft_steps()
    assert prefilled(sim) == 16


def test_all_branches_of_all_requests_are_one_batch() -> None:
    sim = simulation()
    for shift in range(3):
        sim.start(PROMPT[shift:])
    settle(sim)
    for request in sim.requests.values():
        hit(sim, request)
    sim.deliver()
    before = sim.model.forwards
    sim.settle()
    # The branches' first tokens are known; K forwards, and one for the candidates after them.
    assert sim.model.forwards - before <= sim.sizes.depth + 2
    assert max(sim.model.sequences) == 3 * sim.sizes.max_branches


@given(
    st.lists(st.integers(1, 50), max_size=6),
    st.integers(1, 60),
)
def test_a_steps_budget_is_used_up_and_no_prompt_starves(missing: list[int], budget: int) -> None:
    counts = chunk_sizes(missing, budget)
    assert sum(counts) == min(budget, sum(missing))
    assert all(0 <= count <= wanted for count, wanted in zip(counts, missing, strict=True))
    if missing:
        assert counts[0] >= min(missing[0], (budget + 1) // 2)
    for i, j in itertools.permutations(range(1, len(missing)), 2):
        if missing[i] < missing[j] and counts[j]:
            assert counts[i] == missing[i]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    sim = simulation(prefill_chunk=8, prefill_chunk_idle=8, max_length=256)
    sim.start(list(range(11)) * 16)
    sim.deliver()
    short = sim.start(PROMPT[:5])
    sim.deliver()
    sim.draft_steps(3)
    sim.target_receives(9)
    assert sim.look_up(short).drafted[:1] == sim.greedy(short, 1)
    assert sim.engine.allocator.catching_up
    settle(sim)


def test_prompts_that_start_together_compute_their_common_beginning_once() -> None:
    sim = simulation()
    prompt = list(range(11)) * 3
    requests = [sim.start([*prompt, last]) for last in range(4)]
    settle(sim)
    assert prefilled(sim) == len(prompt) // 4 * 4 + 4 * (len(prompt) % 4 + 1)
    blocks = [trunk_blocks(sim, request)[: len(prompt) // 4] for request in requests]
    assert all(shared == blocks[0] for shared in blocks)
    for request in requests:
        assert hit(sim, request) == sim.greedy(request, 3)


# ---- idle and preempted requests


def test_a_request_that_is_not_scheduled_keeps_its_state() -> None:
    sim = simulation()
    idle, busy = sim.start(PROMPT), sim.start(PROMPT[::-1])
    settle(sim)
    hit(sim, idle)
    settle(sim)
    held = trunk_blocks(sim, idle)
    for _ in range(5):
        hit(sim, busy)
        settle(sim)
    before = prefilled(sim)
    assert trunk_blocks(sim, idle) == held
    assert hit(sim, idle) == sim.greedy(idle, 3)
    settle(sim)
    assert prefilled(sim) == before


# ---- shortage


def test_short_of_rows_a_request_gets_fewer_branches() -> None:
    sim = simulation(max_rows=4)
    request = sim.start(PROMPT)
    settle(sim)
    cache = sim.published.cache
    assert len(paths(cache, cache.trees[request.handle])) == 4
    assert hit(sim, request) == sim.greedy(request, 3)


def test_short_of_rows_all_requests_get_equally_many_branches() -> None:
    sim = simulation(max_rows=9)
    requests = [sim.start(PROMPT[shift:]) for shift in range(3)]
    settle(sim)
    for _ in range(2):
        hit_together(sim, requests)
        settle(sim)
    cache = sim.published.cache
    assert [len(paths(cache, cache.trees[r.handle])) for r in requests] == [3, 3, 3]


def test_short_of_blocks_a_request_gets_fewer_branches() -> None:
    sim = simulation(num_blocks=9)
    request = sim.start(PROMPT)
    settle(sim)
    cache = sim.published.cache
    assert 1 < len(paths(cache, cache.trees[request.handle])) < 8
    assert hit(sim, request) == sim.greedy(request, 3)


def test_forks_are_freed_for_a_new_request() -> None:
    sim = simulation(num_blocks=10)
    first = sim.start(PROMPT)
    settle(sim)
    second = sim.start(PROMPT[::-1])
    settle(sim)
    cache = sim.published.cache
    assert list(paths(cache, cache.trees[first.handle])) == [()]
    # Both trunks give a draft.
    assert hit(sim, first) == sim.greedy(first, 3)
    assert hit(sim, second) == sim.greedy(second, 3)


def guessed(sim: Simulation, request: TargetRequest) -> list[tuple[int, ...]]:
    """The outcomes of a request that have a fork in the target's tree."""
    cache = sim.published.cache
    return [key for key in paths(cache, cache.trees[request.handle]) if key]


def test_short_of_rows_the_likeliest_outcomes_of_all_requests_are_guessed() -> None:
    sim = simulation(max_rows=12)
    sim.model.confidence_at = lambda position: 0.97 if position < 20 else 0.4
    sure, doubtful = sim.start(PROMPT), sim.start(PROMPT * 3)
    settle(sim)
    hit_together(sim, [sure, doubtful])
    settle(sim)
    assert sure.proposed
    assert doubtful.proposed
    assert len(guessed(sim, doubtful)) > len(guessed(sim, sure)) + 3


def test_short_of_rows_the_least_likely_forks_of_all_requests_go_first() -> None:
    sim = simulation(max_rows=9)
    first = sim.start(PROMPT)
    settle(sim)
    [there] = sim.session.share.requests.values()
    by_chance = sorted(there.forks, key=lambda row: float(sim.rows.chance[row]))
    sim.start(PROMPT[::-1])
    settle(sim)
    # The row that was free is the new trunk's; two more would be taken from the unlikeliest.
    sim.start(PROMPT[2:])
    sim.start(PROMPT[3:])
    settle(sim)
    assert set(there.forks) == set(by_chance[2:])
    # The others are still in the target's tree, and hit.
    assert sim.verify(first, 0, sim.best(PROMPT)[1]) == sim.greedy(first, 3)


def test_a_hit_is_followed_before_another_request_takes_blocks() -> None:
    sim = simulation(num_blocks=30, block_size=2, max_rows=16)
    hitting = sim.start(PROMPT[::-1])
    settle(sim)
    wanting = sim.start(PROMPT * 2)
    settle(sim)
    there = sim.session.share.requests[hitting.handle]
    unlikeliest = min(there.forks, key=lambda row: float(sim.rows.chance[row]))
    # One outcome is a miss and needs blocks; the other is the fork that would be given up first.
    sim.confirm(wanting, 0, sim.best(wanting.text)[-1])
    sim.confirm(hitting, 0, int(sim.cache.tokens[unlikeliest, 0]))
    sim.propose([wanting, hitting])
    sim.deliver()
    assert len(hitting.proposed) == 3
    assert there.drafted.tolist()[:3] == hitting.proposed, "the hit branch is the trunk"
    settle(sim)


def test_an_error_between_taking_rows_and_blocks_and_noting_them_loses_nothing() -> None:
    sim = simulation()
    request = sim.start(PROMPT)
    sim.deliver()
    broken, sim.rows.tables.fork = sim.rows.tables.fork, None  # type: ignore[assignment]
    with pytest.raises(TypeError):  # the trunk is there, its forks take rows and blocks
        sim.draft_steps(9)
    sim.rows.tables.fork = broken  # type: ignore[method-assign]
    sim.resync()
    assert sim.rows.free_count >= sim.sizes.max_rows - 1
    settle(sim)
    (request,) = sim.requests.values()
    assert hit(sim, request) == sim.greedy(request, 3)
    settle(sim)


def test_a_block_that_is_still_to_be_copied_is_not_reused() -> None:
    sim = simulation(num_blocks=400, block_size=4)
    request = sim.start(PROMPT)
    settle(sim)
    # Two rounds arrive with no forward between them: a fork is forked before it was copied.
    for _ in range(2):
        sim.confirm(request, 0, sim.best(request.text)[1])
        sim.propose([request])
        sim.deliver()
        check_always(sim)
    settle(sim)
    assert sim.verify(request, 0, sim.best(request.text)[1])


def test_the_least_recently_used_request_is_evicted_and_comes_back() -> None:
    sim = simulation(max_rows=2, num_blocks=40)
    idle, second = sim.start(PROMPT), sim.start(PROMPT[::-1])
    settle(sim)
    hit(sim, second)
    settle(sim)
    third = sim.start([5] * 6)
    settle(sim)
    assert holds_nothing(sim, idle)
    assert idle.handle in sim.published.withdrawn
    assert sim.session.counters["draft_evictions"] == 1
    # It is back with the outcome after its own; the third has not been used since it started.
    hit(sim, second)
    sim.finish([third])
    settle(sim)
    assert sim.verify(idle, 0, sim.best(PROMPT)[0]) == []
    settle(sim)
    assert not holds_nothing(sim, idle)
    assert hit(sim, idle) == sim.greedy(idle, 3)


def test_requests_used_in_the_same_frame_do_not_evict_each_other() -> None:
    sim = simulation(max_rows=1)
    first, second = sim.start(PROMPT), sim.start(PROMPT[::-1])
    settle(sim)
    for _ in range(3):
        hit_together(sim, [first, second])
        settle(sim)
        assert sim.session.counters["draft_evictions"] == 0
        assert holds_nothing(sim, second)
        assert first.proposed == sim.greedy(first, 3)


def test_a_request_that_finds_no_row_is_not_waited_for() -> None:
    sim = simulation(max_rows=1)
    sim.start(PROMPT)
    turned_away = sim.start(PROMPT[::-1])
    settle(sim)
    assert turned_away.handle in sim.published.withdrawn


def test_a_request_evicted_with_a_proposal_under_way_is_drafted_past_it() -> None:
    sim = simulation(max_rows=1)
    first = sim.start(PROMPT)
    settle(sim)
    second = sim.start(PROMPT[::-1])
    sim.confirm(second, 0, sim.best(second.text)[0])
    sim.propose([second])
    # The target still has its tree when it proposes.
    assert hit(sim, first) == sim.greedy(first, 3)
    settle(sim)
    # It came back too late for forks, but its trunk covers the outcome that all are accepted.
    assert hit(sim, first) == sim.greedy(first, 3)


def test_a_text_that_can_never_fit_is_refused_every_time() -> None:
    sim = simulation(num_blocks=4)
    request = sim.start(PROMPT * 3)
    for _ in range(3):
        settle(sim)
        assert request.handle in sim.published.withdrawn
        assert sim.verify(request, 0, 0) == []
    assert sim.blocks.free_count == 3


def test_a_text_longer_than_the_draft_can_follow_is_left_alone() -> None:
    sim = simulation(max_length=16)
    request = sim.start(PROMPT * 2)
    settle(sim)
    assert holds_nothing(sim, request)
    assert sim.verify(request, 0, 0) == []
    settle(sim)
    assert sim.model.forwards == 0


def test_a_text_that_cannot_fit_takes_nothing_from_the_others() -> None:
    sim = simulation(num_blocks=60, max_length=300)
    requests = [sim.start(PROMPT), sim.start(PROMPT[::-1])]
    settle(sim)
    too_long = sim.start(PROMPT * 25)
    settle(sim)
    cache = sim.published.cache
    for _ in range(3):
        everyone = [*requests, too_long]
        hit_together(sim, everyone)
        settle(sim)
        assert holds_nothing(sim, too_long)
        assert all(len(paths(cache, cache.trees[r.handle])) > 1 for r in requests)


def test_requests_of_a_frame_do_not_evict_each_other_in_any_order() -> None:
    sim = simulation(max_rows=2)
    first, second, third = (sim.start(PROMPT[shift:]) for shift in range(3))
    settle(sim)
    for order in ([first, second, third], [third, first, second], [second, third, first]):
        hit_together(sim, order)
        settle(sim)
        assert holds_nothing(sim, third)
        assert sim.session.counters["draft_evictions"] == 0


# ---- the end


def test_everything_is_free_when_all_requests_are_finished() -> None:
    sim = simulation()
    requests = [sim.start(PROMPT[shift:]) for shift in range(4)]
    for _ in range(3):
        settle(sim)
        for request in requests:
            hit(sim, request)
    sim.finish(requests)
    settle(sim)
    check_blocks(sim)
    assert sim.blocks.free_count == sim.sizes.num_blocks - 1
    assert sim.rows.free_count == sim.sizes.max_rows
    assert not sim.engine.has_work


def test_a_request_finished_with_its_tree_on_the_way_leaves_no_tree_behind() -> None:
    sim = simulation()
    request = sim.start(PROMPT)
    sim.draft_receives()
    sim.draft_steps(3)
    sim.finish([request])
    settle(sim)
    assert not sim.published.cache.trees
    assert not sim.published.withdrawn
