"""One engine of the demonstration: answers questions one at a time and streams the text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_ssd.cli.engine_process import (
    EngineSpec,
    chat,
    counters,
    difference,
    dtype_of,
    run_apart,
    start_engine,
)


@dataclass(kw_only=True)
class Questions(EngineSpec):
    """What to start and what to ask."""

    prompts: list[str]
    max_tokens: int
    again_at: float | None = None
    """A temperature at which all are asked once more, after the greedy answers and unseen."""


class Started(NamedTuple):
    """The engine is up."""

    seconds: float


class Said(NamedTuple):
    """More of one answer."""

    prompt: int
    text: str


@dataclass
class Answers:
    """All answers, and the time they took."""

    token_ids: list[list[int]]
    dtype: str = ""
    """What the target was computed in, as ``EngineSpec.dtype``."""
    seconds: float = 0.0
    """Time in which all answers were generated."""
    gaps: float = 0.0
    """Time between each answer's first token and its last, summed up."""
    metrics: dict[str, float] = field(default_factory=dict)
    """vLLM's speculative decoding counters and ours."""
    again: Answers | None = None
    """The answers at ``Questions.again_at``."""


def ask(spec: Questions, listen: Callable[[Started | Said], None]) -> Answers:
    """Run one engine in a process of its own.

    Args:
        spec: what to start and what to ask.
        listen: called with what happens, as it happens.

    Raises:
        EngineError: it failed.
    """
    return run_apart(answer, spec, listen)


def answer(spec: Questions, tell: Callable[[Started | Said], None]) -> Answers:
    """Start the engine and answer: what runs in its process.

    Args:
        spec: what to start and what to ask.
        tell: takes what happens, as it happens.
    """
    from vllm import SamplingParams

    began = time.perf_counter()
    engine = start_engine(spec, kv_cache_memory_bytes=512 << 20)
    prompts = [chat(engine, prompt) for prompt in spec.prompts]
    # The first request is slower: some things are set up only then.
    engine.add_request("warm-up", prompts[0], SamplingParams(temperature=0.0, max_tokens=4))
    while engine.has_unfinished_requests():
        engine.step()
    tell(Started(time.perf_counter() - began))
    answers = _answers(engine, prompts, 0.0, spec.max_tokens, tell)
    if spec.again_at is not None:
        answers.again = _answers(engine, prompts, spec.again_at, spec.max_tokens)
    return answers


def _answers(
    engine: Any,
    prompts: list[Any],
    temperature: float,
    max_tokens: int,
    tell: Callable[[Started | Said], None] = lambda event: None,
) -> Answers:
    """Answer all questions, one at a time."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    before = counters(engine)
    answers = Answers(token_ids=[[] for _ in prompts], dtype=dtype_of(engine))
    for index, prompt in enumerate(prompts):
        parameters = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            # Sampled answers end anywhere; engines are compared over the same lengths.
            ignore_eos=temperature > 0.0,
            output_kind=RequestOutputKind.DELTA,
        )
        began = time.perf_counter()
        first = last = 0.0
        engine.add_request(f"{temperature}-{index}", prompt, parameters)
        while engine.has_unfinished_requests():
            for output in engine.step():
                last = time.perf_counter()
                first = first or last
                answers.token_ids[index] += output.outputs[0].token_ids
                tell(Said(index, output.outputs[0].text))
        answers.seconds += time.perf_counter() - began
        answers.gaps += last - first
    answers.metrics = difference(before, counters(engine))
    return answers
