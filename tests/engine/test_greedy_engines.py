"""Greedy output is token-identical however the engine is configured."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.engine.harness import LONG_WAIT_MS, Job, Pair, Spec, greedy, prompt, staggered
from tests.tiny_models import VOCABULARY, TinyModels

LENGTHS = (70, 9, 200, 33, 65, 130, 18, 97, 5, 48, 160, 21, 80, 11, 38, 64)


@pytest.mark.slow
def test_no_prefix_caching_and_one_token_at_a_time(start_pair: Callable[[Spec], Pair]) -> None:
    options = {"fan_out": 8, "max_wait_ms": LONG_WAIT_MS}
    pair = start_pair(Spec("near", 1, options, {"enable_prefix_caching": False}))
    jobs = staggered(LENGTHS, every=1, params=greedy(30))
    stats = pair.check_identical([*jobs, *jobs])
    assert 0 < stats["tokens_accepted"] < stats["tokens_drafted"]
    assert pair.ssd.metric("prefix_cache_hits") == 0


def test_chunked_prefill_and_drafts_cut_by_the_token_budget(
    start_pair: Callable[[Spec], Pair],
) -> None:
    # Three requests that verify eleven tokens a step leave the fourth three tokens of the budget,
    # and none to the others; long prompts come in as many pieces as that takes.
    depth, budget = 10, 36
    options = {"fan_out": 1, "max_wait_ms": LONG_WAIT_MS}
    pair = start_pair(Spec("itself", depth, options, {"max_num_batched_tokens": budget}))
    lengths = (150, 9, 5, 12, 8, 3, 17, 11, 4, 130, 6, 10)
    jobs = [Job(prompt(n, n), greedy(80), arrives=n % 4) for n in lengths]
    stats = pair.check_identical(jobs)
    verified = pair.ssd.metric("spec_decode_num_draft_tokens")
    assert stats["tokens_drafted"] == verified
    assert stats["depth_at_hit"] - verified > 4 * depth
    assert stats["tokens_accepted"] > 0.98 * verified


def test_preemption(start_pair: Callable[[Spec], Pair]) -> None:
    options = {"fan_out": [6, 2, 1, 3], "max_wait_ms": LONG_WAIT_MS}
    pair = start_pair(Spec("near", 3, options, {"num_gpu_blocks_override": 20}))
    before = pair.ssd.metric("num_preemptions")
    jobs = [Job(prompt(30 + 3 * i, i), greedy(60), arrives=i) for i in range(12)]
    stats = pair.check_identical(jobs)
    assert pair.ssd.metric("num_preemptions") > before
    assert stats["tokens_accepted"] > 0


@pytest.mark.slow
def test_padded_misses(start_pair: Callable[[Spec], Pair]) -> None:
    options = {"fan_out": 1, "max_wait_ms": LONG_WAIT_MS, "pad_misses": True}
    pair = start_pair(Spec("near", 4, options))
    stats = pair.check_identical(staggered(LENGTHS, every=2, params=greedy(40)))
    verified = pair.ssd.metric("spec_decode_num_draft_tokens")
    # Only what was drafted counts in our own figures.
    assert 0 < stats["tokens_drafted"] < verified
    # All are as long as can be, but for the last ones before a request's end.
    depth = pair.spec.depth
    missing = depth * pair.ssd.metric("spec_decode_num_drafts") - verified
    assert 0 <= missing <= len(LENGTHS) * depth * (depth - 1) / 2
    # Padding must not cross min_tokens either, where vLLM would let an end token through.
    ends = {"ignore_eos": False, "stop_token_ids": list(range(100, 300))}
    pair.check_identical(
        [Job(prompt(8 + n, n), greedy(40, min_tokens=5 + n, **ends)) for n in range(8)]
    )


@pytest.mark.slow
def test_tokens_that_the_draft_lacks(
    models: TinyModels, start_pair: Callable[[Spec], Pair], tmp_path: Path
) -> None:
    # A padded vocabulary of the target, and a client that uses what is beyond the draft's.
    shutil.copytree(models.near, tmp_path / "draft")
    draft = AutoModelForCausalLM.from_pretrained(models.near)
    draft.resize_token_embeddings(VOCABULARY - 32)
    draft.save_pretrained(tmp_path / "draft")
    options = {"model": str(tmp_path / "draft"), "max_wait_ms": LONG_WAIT_MS}
    pair = start_pair(Spec("near", 3, options))
    stats = pair.check_identical(
        [
            Job([*prompt(20 + n, n), *range(VOCABULARY - 3 * n, VOCABULARY)], greedy(40), arrives=n)
            for n in range(6)
        ]
    )
    assert stats["tokens_accepted"] > 0
    assert stats["restarts"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "fan_out"),
    [(1, 1), (1, 8), (2, 2), (3, 5), (4, 3), (5, 7), (6, 1), (7, 6), (8, 4), (9, 2), (10, 8)],
)
@pytest.mark.parametrize("draft", ["random", "near", "itself"])
def test_any_depth_and_fan_out(
    start_pair: Callable[[Spec], Pair], draft: str, depth: int, fan_out: int
) -> None:
    pair = start_pair(Spec(draft, depth, {"fan_out": fan_out, "max_wait_ms": 50.0}))
    stats = pair.check_identical(staggered(LENGTHS, every=2, params=greedy(60)))
    # A random draft hits by chance alone.
    if draft != "random":
        assert stats["tokens_accepted"] > 0
