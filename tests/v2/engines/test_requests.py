"""Greedy answers are plain V2's whatever a request asks for, and drafts are accepted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine.byte_models import byte_models
from tests.engine.grammars import REGEX, SCHEMA, with_grammar
from tests.engine.harness import Answer, Engine, Job, assert_identical, greedy, prompt
from tests.engine.logprobs import check_logprobs
from tests.tiny_models import TinyModels
from tests.v2.engines.harness import Answers, answers, running

pytestmark = pytest.mark.slow


def each(count: int = 3, **parameters: Any) -> list[Job]:
    """Requests with these parameters, some without beside them."""
    return [
        Job(prompt(12 + i, i), greedy(30, **(parameters if i % 2 == 0 else {})), arrives=i)
        for i in range(count)
    ]


SEVERAL = SamplingParams(n=2, temperature=1.0, top_k=1, max_tokens=20, ignore_eos=True)
"""vLLM refuses n > 1 when greedy; the likeliest token alone is left by top_k = 1."""
BESIDE = Job(prompt(20), greedy(40))
"""What the draft can guess."""
ENDS = list(range(100, 300, 2))
"""No more than V2 takes."""

WORKLOADS: dict[str, list[Job]] = {
    "regex": [*(with_grammar(seed, regex=REGEX) for seed in range(3)), BESIDE],
    "json": [*(with_grammar(seed, json=SCHEMA) for seed in range(3)), BESIDE],
    "choice": [*(with_grammar(seed, choice=["red", "green", "blue"]) for seed in range(3)), BESIDE],
    "grammar cut by the length": [
        *(with_grammar(i, [1, 7, 25][i], regex="([a-z]{3} ){20}") for i in range(3)),
        BESIDE,
    ],
    "repetition": each(repetition_penalty=1.3),
    "presence and frequency": each(presence_penalty=0.8, frequency_penalty=0.5),
    "bad words": each(bad_words=["a", "th"]),
    "allowed tokens": each(allowed_token_ids=list(range(40, 80))),
    "min tokens": each(min_tokens=12, ignore_eos=False, stop_token_ids=ENDS),
    "several": [Job(prompt(30), SEVERAL), Job(prompt(30), greedy(20)), Job(prompt(65, 2), SEVERAL)],
    # 97 tokens: all but one are cached the second time.
    "again": [Job(prompt(97, 3), greedy(20)), Job(prompt(97, 3), greedy(20), arrives=60)],
    "model length": [
        Job(prompt(255, 1), greedy(None)),
        Job(prompt(215, 4), greedy(None), arrives=3),
        BESIDE,
    ],
    "more than the batch holds": [Job(prompt(9 + n, n), greedy(4 + n % 7)) for n in range(22)],
    "aborted": [
        Job(prompt(9 + 3 * i, i), greedy(30), arrives=i, abort_after=4 * i + 1 if i % 2 else None)
        for i in range(5)
    ],
}


@pytest.fixture(scope="module")
def models(tiny_pair: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """The tiny models, able to write any text."""
    return byte_models(tiny_pair, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def wanted(models: TinyModels) -> dict[str, Answers]:
    """What plain V2 answers, without aborts."""
    with running(models, None, asynchronous=False) as engine:
        return {
            name: engine.run([Job(job.prompt, job.params, job.arrives) for job in jobs])
            for name, jobs in WORKLOADS.items()
        }


@pytest.fixture(scope="module")
def engine(
    models: TinyModels, asynchronous: bool, wanted: dict[str, Answers], logprobs: list[Any]
) -> Iterator[Engine]:
    """An engine that is its own draft."""
    with running(models, "itself", asynchronous) as engine:
        yield engine


@pytest.mark.parametrize("workload", WORKLOADS)
def test_answers_are_those_of_plain_v2(
    engine: Engine, wanted: dict[str, Answers], workload: str
) -> None:
    cached = engine.metric("prefix_cache_hits")
    answered, grown = answers(engine, WORKLOADS[workload])
    assert_identical(WORKLOADS[workload], wanted[workload], answered)
    assert grown["tokens_accepted"] > 0
    checks = {"regex": is_regex, "json": is_json, "choice": is_choice}
    for (answer,) in answered[:-1] if workload in checks else []:
        assert checks[workload](answer)
    if workload == "again":
        assert engine.metric("prefix_cache_hits") >= cached + 96


def is_regex(answer: Answer) -> bool:
    return bool(re.fullmatch(REGEX, answer.text))


def is_json(answer: Answer) -> bool:
    return set(json.loads(answer.text)) == {"colour", "sizes", "name"}


def is_choice(answer: Answer) -> bool:
    return answer.text in ("red", "green", "blue")


# ---- logprobs

WITH_LOGPROBS = [
    Job(prompt(20), greedy(20, logprobs=3)),
    Job(prompt(40, 1), greedy(20, logprobs=0)),
    Job(prompt(35, 2), greedy(20, logprobs=2, prompt_logprobs=2)),
    BESIDE,
]


@pytest.fixture(scope="module")
def logprobs(models: TinyModels) -> list[Any]:
    """What plain V2 answers, with logprobs."""
    with running(models, None, asynchronous=False) as engine:
        return engine.run_raw(WITH_LOGPROBS)


def test_logprobs(engine: Engine, logprobs: list[Any]) -> None:
    for want, have in zip(logprobs, engine.run_raw(WITH_LOGPROBS), strict=True):
        assert have.outputs[0].token_ids == want.outputs[0].token_ids
        check_logprobs(want.outputs[0].logprobs, have.outputs[0].logprobs)
        check_logprobs(want.prompt_logprobs, have.prompt_logprobs)


# ---- what happens while a prompt is computed


def test_a_request_is_aborted_while_its_prompt_is_computed(
    engine: Engine, wanted: dict[str, Answers]
) -> None:
    # Four chunks (max_num_batched_tokens); it is gone after the first, second or third.
    for steps in (1, 2, 3):
        before = engine.stats()
        llm = engine.llm.llm_engine
        prompt_of: Any = {"prompt_token_ids": prompt(250, 6 + steps)}  # none is cached
        req_id = llm.add_request(f"gone-{steps}", prompt_of, greedy(5))
        for _ in range(steps):
            assert not [output for output in llm.step() if output.outputs[0].token_ids]
        llm.abort_request([req_id], internal=True)
        answered, grown = answers(engine, WORKLOADS["repetition"])
        assert answered == wanted["repetition"]
        assert grown["tokens_accepted"] > 0
        assert engine.stats()["look_ups"] - before["look_ups"] == grown["look_ups"]
