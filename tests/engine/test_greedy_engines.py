"""Greedy output is token-identical however the engine is configured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine.harness import LONG_WAIT_MS, Job, Pair, Spec, greedy, prompt, staggered

LENGTHS = (70, 9, 200, 33, 65, 130, 18, 97, 5, 48, 160, 21, 80, 11, 38, 64)


def test_no_prefix_caching_and_one_token_at_a_time(start_pair: Callable[[Spec], Pair]) -> None:
    options = {"fan_out": 8, "max_wait_ms": LONG_WAIT_MS}
    pair = start_pair(Spec("near", 1, options, {"enable_prefix_caching": False}))
    jobs = staggered(LENGTHS, every=1, params=greedy(30))
    stats = pair.check_identical([*jobs, *jobs])
    assert 0 < stats["tokens_accepted"] < stats["tokens_drafted"]
    assert pair.ssd.metric("prefix_cache_hits") == 0


@pytest.mark.slow
def test_chunked_prefill_and_drafts_cut_by_the_token_budget(
    start_pair: Callable[[Spec], Pair],
) -> None:
    depth, budget = 10, 48
    options = {"fan_out": 1, "max_wait_ms": LONG_WAIT_MS}
    pair = start_pair(Spec("itself", depth, options, {"max_num_batched_tokens": budget}))
    stats = pair.check_identical(staggered(LENGTHS, every=1, params=greedy(50)))
    cut = stats["depth_at_hit"] - stats["tokens_drafted"]
    # More than the ends of the requests explain.
    assert cut > 2 * depth * len(LENGTHS)
    assert stats["tokens_accepted"] > 0.98 * stats["tokens_drafted"]


def test_preemption(start_pair: Callable[[Spec], Pair]) -> None:
    options = {"fan_out": [6, 2, 1, 3], "max_wait_ms": LONG_WAIT_MS}
    pair = start_pair(Spec("near", 3, options, {"num_gpu_blocks_override": 20}))
    before = pair.ssd.metric("num_preemptions")
    jobs = [Job(prompt(30 + 3 * i, i), greedy(60), arrives=i) for i in range(12)]
    stats = pair.check_identical(jobs)
    assert pair.ssd.metric("num_preemptions") > before
    assert stats["tokens_accepted"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("fan_out", [1, 2, 8])
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8, 10])
@pytest.mark.parametrize("draft", ["random", "near", "itself"])
def test_any_depth_and_fan_out(
    start_pair: Callable[[Spec], Pair], draft: str, depth: int, fan_out: int
) -> None:
    # A random draft hits by chance alone, so its chances are all taken.
    options = {"fan_out": 64 if draft == "random" and fan_out == 8 else fan_out}
    pair = start_pair(Spec(draft, depth, {**options, "max_wait_ms": 50.0}))
    stats = pair.check_identical(staggered(LENGTHS, every=2, params=greedy(60)))
    if draft != "random":
        assert stats["tokens_accepted"] > 0
