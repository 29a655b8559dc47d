"""One engine of the demonstration, in a process of its own: answers prompts and streams the text.

A process for each engine, because vLLM's threads, memory and compiled code outlive an engine.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple


@dataclass
class EngineSpec:
    """What to start and what to ask."""

    model: str
    speculative_config: dict[str, Any] | None
    prompts: list[str]
    max_tokens: int
    enforce_eager: bool
    dtype: str | None = None
    """What the models are computed in; None: the faster of bfloat16 and float32."""


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


class Failed(NamedTuple):
    """The engine ended with an error."""

    reason: str


class EngineError(RuntimeError):
    """An engine did not start or ended too early: the reason and the end of its log."""


ENDING_SECONDS = 15.0
"""How long an engine may take to shut down."""


def ask(spec: EngineSpec, listen: Callable[[Started | Said], None]) -> Answers:
    """Run one engine in a process of its own.

    Args:
        spec: what to start and what to ask.
        listen: called with what happens, as it happens.

    Raises:
        EngineError: it failed.
    """
    context = multiprocessing.get_context("spawn")
    events, theirs = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", prefix="vllm-ssd-demo-", suffix=".log") as log:
        process = context.Process(target=run_engine, args=(spec, theirs, log.name))
        process.start()
        theirs.close()
        try:
            while not isinstance(event := events.recv(), Answers):
                if isinstance(event, Failed):
                    raise EngineError(f"{event.reason}\n{log.read()[-2000:]}")
                listen(event)
            process.join(ENDING_SECONDS)
            return event
        except EOFError:
            raise EngineError(f"its process ended\n{log.read()[-2000:]}") from None
        finally:
            process.kill()
            process.join()


def run_engine(spec: EngineSpec, events: Connection, log: str) -> None:
    """Start the engine and answer: what runs in the process of an engine.

    Args:
        spec: what to start and what to ask.
        events: takes what happens, then the answers or the reason why there are none.
        log: file for all other output, of this process and of its draft's.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    # The engine in this very process: its steps can be watched, its threads are ours to place.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        _answer(spec, events)
    except Exception as error:
        events.send(Failed(f"{type(error).__name__}: {error}"))


def _answer(spec: EngineSpec, events: Connection) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    began = time.perf_counter()
    arguments = EngineArgs(
        model=spec.model,
        dtype=spec.dtype or best_dtype(),
        max_model_len=2048,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=512 << 20,
        enforce_eager=spec.enforce_eager,
        disable_log_stats=False,
        speculative_config=spec.speculative_config,
    )
    engine = LLMEngine.from_engine_args(arguments)
    parameters = SamplingParams(
        temperature=0.0, max_tokens=spec.max_tokens, output_kind=RequestOutputKind.DELTA
    )
    prompts = [_chat(engine, prompt) for prompt in spec.prompts]
    # The first request is slower: some things are set up only then.
    engine.add_request("warm-up", prompts[0], SamplingParams(temperature=0.0, max_tokens=4))
    while engine.has_unfinished_requests():
        engine.step()
    before = _metrics(engine)
    events.send(Started(time.perf_counter() - began))

    dtype = str(engine.vllm_config.model_config.dtype).removeprefix("torch.")
    answers = Answers(token_ids=[[] for _ in prompts], dtype=dtype)
    for index, prompt in enumerate(prompts):
        began = time.perf_counter()
        first = last = 0.0
        engine.add_request(str(index), prompt, parameters)
        while engine.has_unfinished_requests():
            for output in engine.step():
                last = time.perf_counter()
                first = first or last
                answers.token_ids[index] += output.outputs[0].token_ids
                events.send(Said(index, output.outputs[0].text))
        answers.seconds += time.perf_counter() - began
        answers.gaps += last - first
    answers.metrics = _difference(before, _metrics(engine))
    events.send(answers)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def best_dtype() -> str:
    """The model's own type, except on CPUs without instructions for it, where float32 is faster."""
    from vllm.platforms import current_platform

    return "float32" if current_platform.is_cpu() and not cpu_has_bfloat16() else "auto"


def _chat(engine: Any, prompt: str) -> dict[str, list[int]]:
    """A user's message as token ids, in the model's chat format."""
    messages = [{"role": "user", "content": prompt}]
    tokenizer = engine.get_tokenizer()
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return {"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def _metrics(engine: Any) -> dict[str, float]:
    """Counters of vLLM's speculative decoding, and ours where there are any."""
    prefix = "vllm:spec_decode_num_"
    counters = {
        metric.name.removeprefix(prefix): float(metric.value)
        for metric in engine.get_metrics()
        if metric.name.startswith(prefix) and hasattr(metric, "value")
    }
    method = engine.vllm_config.speculative_config
    if method is not None and method.method == "custom_class":
        counters.update(engine.collective_rpc("ssd_stats")[0])
    return counters


def _difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Counters since ``before``."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}
