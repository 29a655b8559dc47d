"""Greedy output is token-identical whatever else is asked for beside the tokens."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine.harness import Job, Pair, greedy, prompt
from tests.engine.logprobs import check_logprobs


@pytest.mark.parametrize(
    "parameters",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.8, "frequency_penalty": 0.5},
        {"bad_words": ["a", "th"]},
        {"allowed_token_ids": list(range(40, 80))},
        {"min_tokens": 12, "ignore_eos": False, "stop_token_ids": list(range(100, 300))},
    ],
    ids=["repetition", "presence-frequency", "bad-words", "allowed-tokens", "min-tokens"],
)
def test_processed_logits(pair: Pair, parameters: dict[str, Any]) -> None:
    # The draft ignores these, and they must not affect the requests beside them.
    jobs = [
        Job(prompt(12 + i, i), greedy(40, **(parameters if i % 2 else {})), arrives=i)
        for i in range(6)
    ]
    pair.check_identical(jobs)


def test_several_completions_of_one_prompt(pair: Pair) -> None:
    # vLLM refuses n > 1 when greedy; the likeliest token alone is left by top_k = 1.
    several = SamplingParams(n=2, temperature=1.0, top_k=1, max_tokens=40, ignore_eos=True)
    jobs = [Job(prompt(30), several), Job(prompt(30), greedy(40)), Job(prompt(65, 2), several)]
    pair.check_identical(jobs)
    (one, two), (expected,), _ = pair.ssd.run(jobs)
    assert one.tokens == two.tokens == expected.tokens


def test_logprobs(pair: Pair) -> None:
    jobs = [
        Job(prompt(20), greedy(30, logprobs=3)),
        Job(prompt(40, 1), greedy(30, logprobs=0)),
        Job(prompt(35, 2), greedy(30, logprobs=2, prompt_logprobs=2)),
        Job(prompt(20), greedy(30)),
    ]
    expected, found = pair.plain.run_raw(jobs), pair.ssd.run_raw(jobs)
    for want, have in zip(expected, found, strict=True):
        assert have.outputs[0].token_ids == want.outputs[0].token_ids
        check_logprobs(want.outputs[0].logprobs, have.outputs[0].logprobs)
        check_logprobs(want.prompt_logprobs, have.prompt_logprobs)
