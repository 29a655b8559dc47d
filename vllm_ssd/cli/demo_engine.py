"""One engine of the demonstration: answers questions one at a time and streams the text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

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
    from vllm.sampling_params import RequestOutputKind

    began = time.perf_counter()
    engine = start_engine(spec, kv_cache_memory_bytes=512 << 20)
    parameters = SamplingParams(
        temperature=0.0, max_tokens=spec.max_tokens, output_kind=RequestOutputKind.DELTA
    )
    prompts = [chat(engine, prompt) for prompt in spec.prompts]
    # The first request is slower: some things are set up only then.
    engine.add_request("warm-up", prompts[0], SamplingParams(temperature=0.0, max_tokens=4))
    while engine.has_unfinished_requests():
        engine.step()
    before = counters(engine)
    tell(Started(time.perf_counter() - began))

    answers = Answers(token_ids=[[] for _ in prompts], dtype=dtype_of(engine))
    for index, prompt in enumerate(prompts):
        began = time.perf_counter()
        first = last = 0.0
        engine.add_request(str(index), prompt, parameters)
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
