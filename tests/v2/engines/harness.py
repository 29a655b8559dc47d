"""Engines with vLLM's V2 runner: started with SSD or without, and what they are asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from vllm import SamplingParams

from tests.engine.harness import Answer, Engine, Job, difference
from tests.robustness.harness import prompts
from tests.tiny_models import EOS, TinyModels
from vllm_ssd.metrics import by_source

DEPTH = 3
Answers = list[list[Answer]]


def job(index: int, tokens: int = 24, **more: Any) -> Job:
    """A request of its own: prompts differ in length and content."""
    params = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, **more}
    prompt = [1, *range(10 + index, 16 + 4 * index)] * 2
    return Job(prompt, SamplingParams(**params), arrives=3 * index)


WORKLOADS: dict[str, list[Job]] = {
    "plain": [job(index) for index in range(3)],
    # They end, on tokens that greedy answers have or at once, while others go on.
    "ends": [
        *[job(index, ignore_eos=False, stop_token_ids=[*range(5, 300, 7)]) for index in range(3)],
        job(3, tokens=1),
        job(4, min_tokens=12, ignore_eos=False, stop_token_ids=[EOS, *range(5, 300, 3)]),
    ],
    "penalties": [job(index, repetition_penalty=1.3, logprobs=1) for index in range(2)],
    # Prompts of several chunks (max_num_batched_tokens).
    "chunks": [Job([1, *([7, 8, 9 + index] * 50)], job(0, tokens=12).params) for index in range(2)],
}
ARGUMENTS: dict[str, Any] = {
    "kv_cache_memory_bytes": 1 << 28,
    "max_num_batched_tokens": 64,
    "disable_log_stats": False,
}
"""Of all engines here, whatever their runner."""


class Text(NamedTuple):
    """A prompt, and how many tokens are to follow it."""

    prompt: list[int]
    tokens: int


TEXTS = [Text(prompt, 48) for prompt in prompts(4)]
LONG = Text(prompts(5)[-1], 900)
"""It outlives the start of a draft."""


def start(
    models: TinyModels,
    draft: str | None,
    asynchronous: bool,
    strict: bool = True,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Engine:
    """An engine on V2.

    Args:
        models: the target and its drafts.
        draft: which of these it has; ``None`` for one without SSD.
        asynchronous: whether steps are scheduled ahead.
        strict: errors of the plugin fail the test.
        options: others of SSD.
        **more: vLLM's arguments.
    """
    arguments: dict[str, Any] = {"async_scheduling": asynchronous, **ARGUMENTS, **more}
    if draft is not None:
        arguments["speculative_config"] = {
            "method": "ssd",
            "model": str(models.drafts()[draft]),
            "num_speculative_tokens": DEPTH,
            "branches": 8,
            "strict": strict,
            **(options or {}),
        }
    engine = Engine(str(models.target), **arguments)
    config: Any = engine.llm.llm_engine.vllm_config
    assert config.use_v2_model_runner
    assert config.scheduler_config.async_scheduling == asynchronous
    return engine


@contextmanager
def running(*arguments: Any, **more: Any) -> Iterator[Engine]:
    """The same, for a while."""
    engine = start(*arguments, **more)
    try:
        yield engine
    finally:
        engine.close()


def runner_of(engine: Engine) -> Any:
    """vLLM's model runner, in-process."""
    core: Any = engine.llm.llm_engine.engine_core
    return core.engine_core.model_executor.driver_worker.worker.model_runner


def drafts_of(engine: Engine) -> Any:
    """What connects the engine to its draft, in-process."""
    return runner_of(engine).speculator._drafts


def answers(engine: Engine, jobs: Sequence[Job]) -> tuple[Answers, dict[str, float]]:
    """What an engine answers, and what its counters have grown by, tokens by source too."""
    before = engine.stats()
    answered = engine.run(jobs)
    after = engine.stats()
    assert after["errors"] == after["texts_lost"] == after["misses_cannot_draft"] == 0
    grown = difference(after, before)
    return answered, {**grown, **by_source(grown)}


def client_of(engine: Engine) -> Any:
    """The client of the draft, in-process; its thread alone may call it, others look at it."""
    return drafts_of(engine).thread._client
