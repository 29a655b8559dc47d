"""One engine in a process of its own: it answers, is measured, and is watched."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.cuda.explained import explained
from tests.cuda.marks import Marks, marked, used_bytes
from tests.cuda.steps import Step, Steps, Waits, worker_of
from vllm_ssd.cli.engine_process import EngineSpec, chat, counters, difference, start_engine

if TYPE_CHECKING:
    from vllm import SamplingParams

MAX_MODEL_LEN = 1024
PREFILL_TOKENS = 256
"""Fewer than the longest prompt has, so that it is prefilled in chunks."""
LONG_PROMPT = 400
ANSWERS = 6
ANSWER_TOKENS = 48
ARRIVES_EVERY = 3
"""Steps from one request to the next."""
SPEED_TOKENS = 128
SETTLE_SECONDS = 0.5
"""Until the draft's counters have arrived: twice the time from one report to the next."""


@dataclass(kw_only=True)
class Work(EngineSpec):
    """What to start and what to do with it."""

    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    """vLLM's engine arguments."""
    questions: list[str] | None
    """What is asked; None: texts of random tokens, for a model without a chat format."""
    forced: bool = False
    """Speculate in every round, with all that is found: what is looked for must not depend on
    whether it pays."""
    sizes: tuple[int, ...] = ()
    """Batch sizes to measure the speed at."""
    watched_rounds: int = 0
    """How often each question is answered to watch the steps, on V1; 0: they are not."""
    counts_waits: bool = False
    limit_s: int
    """The process ends after so long, with its threads' stacks in the log."""


class Speed(NamedTuple):
    """Of one batch size."""

    tokens_per_second: float
    ms_per_token: float
    """Of one request."""
    accepted_length: float
    """Tokens of a verification; nan where nothing was drafted."""
    hit_rate: float
    """Of SSD; nan elsewhere."""
    off_rate: float
    """Of SSD: of its rounds, those without speculation, since plain decoding is faster."""


class Watched(NamedTuple):
    """The steps of one request at a time."""

    alone: list[Step]
    """From a record of the texts: the draft has nothing to do."""
    beside: list[Step]
    """Beside the draft's."""
    depth: int
    counters: dict[str, float]
    """Growth during the steps beside the draft."""


class Waited(NamedTuple):
    """For the device, greedy and with a temperature."""

    places: Counter[str]
    """Where the host did, and how often."""
    steps: int
    """In how many steps."""


class Found(NamedTuple):
    """What one engine has shown."""

    start_seconds: float
    runner: str
    """``"V1"`` or ``"V2"``."""
    dtype: str
    attention: str
    """vLLM's name of its attention backend."""
    graphs: str
    """vLLM's name of its mode of CUDA graphs."""
    look_up_graphs: int
    """CUDA graphs of SSD's look-up, on V2."""
    async_scheduling: bool
    kv_tokens: int
    """Of the target's KV cache."""
    answers: list[list[int]]
    counters: dict[str, float]
    """Growth during the answers."""
    speeds: dict[int, Speed]
    watched: Watched | None
    waited: Waited | None
    marks: Marks


def use(work: Work, tell: Callable[[Any], None]) -> Found:
    """Start the engine and do the work: what runs in its process.

    Args:
        work: what to do.
        tell: takes what happens; there is nothing to tell.
    """
    with explained(work.limit_s):
        return _use(work)


def _use(work: Work) -> Found:
    os.environ.update(work.environment)
    began = time.perf_counter()
    engine, marks = _start(work)
    seconds = time.perf_counter() - began
    prompts = _prompts(engine, work.questions)
    before = counters(engine)
    answers = _answer(engine, prompts)
    time.sleep(SETTLE_SECONDS)
    grown = difference(before, counters(engine))
    config, runner = engine.vllm_config, worker_of(engine).model_runner
    speeds = {size: _speed(engine, prompts, size) for size in work.sizes}
    watched = _watch(engine, prompts, work.watched_rounds) if work.watched_rounds else None
    waited = _count_waits(engine, prompts[:2]) if work.counts_waits else None
    marks.worked = used_bytes()
    return Found(
        seconds,
        "V2" if config.use_v2_model_runner else "V1",
        str(config.model_config.dtype).removeprefix("torch."),
        runner.attn_groups[0][0].backend.get_name(),
        str(config.compilation_config.cudagraph_mode),
        _look_up_graphs(runner),
        bool(config.scheduler_config.async_scheduling),
        config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        answers,
        grown,
        speeds,
        watched,
        waited,
        marks,
    )


def _look_up_graphs(runner: Any) -> int:
    from vllm_ssd.target.v2.speculator import SSDSpeculator

    speculator = getattr(runner, "speculator", None)
    ours = isinstance(speculator, SSDSpeculator) and speculator._drafts
    return ours.proposals.graphs if ours else 0


def _start(work: Work) -> tuple[Any, Marks]:
    from tests.decisions import AlwaysOn, deciding

    always = deciding(AlwaysOn) if work.forced else contextlib.nullcontext()
    with marked() as marks, always:
        arguments = {
            "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": PREFILL_TOKENS,
            "enable_prefix_caching": False,
            **work.arguments,
        }
        engine = start_engine(work, **arguments)
    return engine, marks


def _prompts(engine: Any, questions: list[str] | None) -> list[list[int]]:
    """Token ids to ask; the last one is longer than a step's prompt tokens."""
    if questions is None:
        from tests.engine.harness import prompt

        lengths = [5 + 9 * number for number in range(ANSWERS - 1)]
        return [prompt(length, salt) for salt, length in enumerate([*lengths, LONG_PROMPT])]
    asked = [chat(engine, question)["prompt_token_ids"] for question in questions]
    whole = [token for each in asked for token in each]
    long = (whole * (LONG_PROMPT // len(whole) + 1))[:LONG_PROMPT]
    return [*asked, long]


def _answer(engine: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Greedy answers to prompts that arrive one after the other."""
    from vllm.sampling_params import RequestOutputKind

    parameters = _parameters(0.0, ANSWER_TOKENS, RequestOutputKind.DELTA)
    answers: list[list[int]] = [[] for _ in prompts]
    step = asked = 0
    while asked < len(prompts) or engine.has_unfinished_requests():
        if asked < len(prompts) and step >= asked * ARRIVES_EVERY:
            prompt = {"prompt_token_ids": prompts[asked]}
            engine.add_request(f"answer-{asked}", prompt, parameters.clone())
            asked += 1
        for output in engine.step():
            number = int(output.request_id.partition("-")[2].partition("-")[0])
            answers[number] += output.outputs[0].token_ids
        step += 1
    return answers


def _parameters(temperature: float, max_tokens: int, kind: Any) -> SamplingParams:
    from vllm import SamplingParams

    # To the full length, whatever the tokens are, so that engines do the same work.
    return SamplingParams(
        temperature=temperature, max_tokens=max_tokens, ignore_eos=True, output_kind=kind
    )


def _speed(engine: Any, prompts: Sequence[list[int]], size: int) -> Speed:
    """A steady load of ``size`` requests."""
    from benchmarks.load import Streams

    streams = Streams(engine, list(prompts), size, SPEED_TOKENS, 0.0)
    streams.run(max(2, size))
    before = counters(engine)
    measured = streams.run(2 * max(2, size))
    grown = difference(before, counters(engine))
    streams.abort()
    return Speed(
        measured.tokens / measured.seconds,
        1e3 * size * measured.seconds / measured.tokens,
        1.0 + ratio(grown, "accepted_tokens", "drafts"),
        ratio(grown, "hits", "look_ups"),
        ratio(grown, "rounds_off", "proposals"),
    )


def ratio(figures: dict[str, float], part: str, whole: str) -> float:
    """One counter divided by another; nan if that is 0 or there are none."""
    divisor = figures.get(whole, 0.0)
    return figures.get(part, 0.0) / divisor if divisor else float("nan")


def _watch(engine: Any, prompts: Sequence[list[int]], rounds: int) -> Watched:
    """Answer one prompt at a time, with the draft and from a record in turn."""
    depth = engine.vllm_config.speculative_config.num_speculative_tokens
    steps = Steps(engine, depth)
    some = prompts[:2]
    record = [text + _answer(engine, [text])[0] for text in some]
    steps.steps.clear()
    alone: list[Step] = []
    beside: list[Step] = []
    before = counters(engine)
    for _ in range(rounds):
        for text in some:
            for into, known in ((alone, record), (beside, None)):
                steps.record = known
                _answer(engine, [text])
                into += steps.steps
                steps.steps.clear()
    time.sleep(SETTLE_SECONDS)
    grown = difference(before, counters(engine))
    return Watched(alone, beside, depth, grown)


def _count_waits(engine: Any, prompts: Sequence[list[int]]) -> Waited:
    waits = Waits(engine)
    _answer(engine, prompts)
    _sample(engine, prompts)
    return Waited(waits.places, waits.steps)


def _sample(engine: Any, prompts: Sequence[list[int]]) -> None:
    """Answers at a temperature: other paths of the sampler, and of ours, are taken."""
    from vllm.sampling_params import RequestOutputKind

    parameters = _parameters(0.7, ANSWER_TOKENS, RequestOutputKind.FINAL_ONLY)
    for number, prompt in enumerate(prompts):
        request = {"prompt_token_ids": prompt}
        engine.add_request(f"sample-{number}", request, parameters.clone())
    while engine.has_unfinished_requests():
        engine.step()
