"""An engine in a process of its own, and its counters.

A process for each engine, because vLLM's threads, memory and compiled code outlive an engine.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import IO, Any, Generic, NamedTuple, TypeVar

from vllm_ssd.config import ADDITIONAL_CONFIG_KEY

Spec = TypeVar("Spec")
Result = TypeVar("Result")


@dataclass(kw_only=True)
class EngineSpec:
    """What to start."""

    model: str
    speculative_config: dict[str, Any] | None
    enforce_eager: bool
    dtype: str | None = None
    """What the models are computed in; None: the faster of bfloat16 and float32."""
    cores: list[int] | None = None
    """Where its threads are bound, as the plugin binds a target beside a draft; None: nowhere."""


class EngineError(RuntimeError):
    """An engine did not start or ended too early: the reason and the end of its log."""


class _Failed(NamedTuple):
    reason: str


@dataclass
class _Finished(Generic[Result]):
    result: Result


LOG_CHARACTERS = 2000
"""So much of the end of an engine's log is part of an error."""
ENDING_SECONDS = 15.0
"""How long an engine may take to shut down."""


class Work(Generic[Result]):
    """What is done in an engine's process. Iterate over the events that it tells, as they happen.

    After the last one there is :attr:`result`.
    """

    result: Result

    def __init__(self, events: Connection, log: IO[str], log_characters: int) -> None:
        self._events, self._log, self._log_characters = events, log, log_characters

    def __iter__(self) -> Iterator[Any]:
        """The events.

        Raises:
            EngineError: the work failed.
        """
        while not isinstance(event := self._receive(), _Finished):
            yield event
        self.result = event.result

    def _receive(self) -> Any:
        try:
            event = self._events.recv()
        except EOFError:
            event = _Failed("its process ended")
        if isinstance(event, _Failed):
            raise EngineError(f"{event.reason}\n{self._log.read()[-self._log_characters :]}")
        return event


@contextmanager
def engine_process(
    work: Callable[[Spec, Callable[[Any], None]], Result],
    spec: Spec,
    log_characters: int = LOG_CHARACTERS,
) -> Iterator[Work[Result]]:
    """Begin some work with an engine in a process of its own, which ends with the context.

    Args:
        work: a function of a module, called there with ``spec`` and a function to tell events.
        spec: what it needs.
        log_characters: how much of the end of its log an error shows.
    """
    context = multiprocessing.get_context("spawn")
    events, theirs = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", prefix="vllm-ssd-engine-", suffix=".log") as log:
        process = context.Process(target=_run, args=(work, spec, theirs, log.name))
        process.start()
        theirs.close()
        done: Work[Result] = Work(events, log, log_characters)
        try:
            yield done
            if hasattr(done, "result"):
                process.join(ENDING_SECONDS)
        finally:
            process.kill()
            process.join()


def run_apart(
    work: Callable[[Spec, Callable[[Any], None]], Result],
    spec: Spec,
    listen: Callable[[Any], None] = lambda event: None,
    log_characters: int = LOG_CHARACTERS,
) -> Result:
    """Do some work with an engine in a process of its own, to its end.

    Args:
        work: see :func:`engine_process`.
        spec: what it needs.
        listen: called here with the events, as they happen.
        log_characters: how much of the end of its log an error shows.

    Raises:
        EngineError: it failed.
    """
    with engine_process(work, spec, log_characters) as done:
        for event in done:
            listen(event)
        return done.result


def _run(
    work: Callable[[Spec, Callable[[Any], None]], Result], spec: Spec, events: Connection, log: str
) -> None:
    """What runs in the process; all other output, also of its draft's, goes to the log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    # The engine in this very process: its steps can be watched, its threads are ours to place.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        events.send(_Finished(work(spec, events.send)))
    except Exception as error:
        events.send(_Failed(f"{type(error).__name__}: {error}"))


def start_engine(spec: EngineSpec, **arguments: Any) -> Any:
    """Start the engine in this process.

    Args:
        spec: what to start.
        arguments: vLLM's other engine arguments.

    Raises:
        ValueError: this process has had more threads than ``spec.cores``.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    if spec.cores is not None:
        from vllm_ssd.target.cores import bind_target

        if not bind_target(spec.cores):
            raise ValueError(f"the threads of this process cannot be bound to cores {spec.cores}")
    defaults = {"max_model_len": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=spec.model,
            dtype=spec.dtype or best_dtype(),
            enforce_eager=spec.enforce_eager,
            speculative_config=spec.speculative_config,
            disable_log_stats=False,
            **(defaults | arguments),
        )
    )


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def best_dtype() -> str:
    """The model's own type, except on CPUs without instructions for it, where float32 is faster."""
    from vllm.platforms import current_platform

    return "float32" if current_platform.is_cpu() and not cpu_has_bfloat16() else "auto"


def dtype_of(engine: Any) -> str:
    """What its target is computed in, as ``EngineSpec.dtype``."""
    return str(engine.vllm_config.model_config.dtype).removeprefix("torch.")


def chat(engine: Any, message: str) -> dict[str, list[int]]:
    """A user's message as token ids, in the model's chat format."""
    messages = [{"role": "user", "content": message}]
    tokenizer = engine.get_tokenizer()
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return {"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def counters(engine: Any) -> dict[str, float]:
    """Counters of vLLM's speculative decoding, and ours where there are any."""
    prefix = "vllm:spec_decode_num_"
    found = {
        metric.name.removeprefix(prefix): float(metric.value)
        for metric in engine.get_metrics()
        if metric.name.startswith(prefix) and hasattr(metric, "value")
    }
    if ADDITIONAL_CONFIG_KEY in (engine.vllm_config.additional_config or {}):
        found.update(engine.collective_rpc("ssd_stats")[0])
    return found


def difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Counters since ``before``."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}
