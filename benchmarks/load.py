"""An engine under a steady load: n requests run all the time, and tokens are counted.

Each of n streams gets its next prompt as soon as its answer has ended, so that n requests run from
the first counted token to the last; what is still running then is aborted. The prompts of all
streams come from one list, in its order, so every engine does the same work, prefills included.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from benchmarks.rates import Slice
from vllm_ssd.cli.engine_process import (
    EngineSpec,
    chat,
    counters,
    difference,
    dtype_of,
    start_engine,
)

KV_BYTES = 384 << 20
"""Enough for 32 requests of the longest prompts, with several engines in memory at once."""
PREFILL_TOKENS = 1024
SETTINGS_WORKER = "benchmarks.settings_worker.SettingsWorker"


class Case(NamedTuple):
    """One load."""

    prompts: list[str]
    """They begin again when they have ended."""
    size: int
    """n, the requests that run."""
    answers: int
    """How long it is measured: until so many have ended."""


class Turn(NamedTuple):
    """What to measure next."""

    case: int
    """Its number."""
    round: int
    """How often it was measured before; each time its prompts go on where they stopped."""
    setting: int | None = None
    """Which of the engine's settings, if it has several."""


@dataclass(kw_only=True)
class Load(EngineSpec):
    """What to start, and the loads to put on it when told to."""

    cases: list[Case]
    turns: Connection
    """Says what is next (:class:`Turn`); None: that was the last."""
    max_tokens: int
    """Of an answer; it may end before."""
    temperature: float
    warm_up: int = 1
    """How many answers of each stream are not counted, before those that are."""
    settings: list[dict[str, Any]] = field(default_factory=list)
    """Options of SSD that take turns in it."""


class Measured(NamedTuple):
    """What one load gave."""

    slice: Slice
    counters: dict[str, float]
    """vLLM's of speculative decoding and ours, over the same time."""


class Started(NamedTuple):
    """An engine that waits for its first turn."""

    dtype: str
    cores: list[int]
    """Those that the target's process may use."""


def put_on(load: Load, tell: Callable[[Started | Measured], None]) -> None:
    """Start the engine and measure its loads, turn by turn: what runs in its process.

    Args:
        load: what to do.
        tell: called once the engine has started, and after each turn.
    """
    if (load.speculative_config or {}).get("method") == "draft_model":
        from vllm_ssd.target.v1.rejection import fix_cpu_rejection_sampler

        # Without it, no rate above temperature 0 would mean anything on a CPU (see there).
        fix_cpu_rejection_sampler()
    engine = start_engine(
        load,
        kv_cache_memory_bytes=KV_BYTES,
        max_num_seqs=max(case.size for case in load.cases),
        max_num_batched_tokens=PREFILL_TOKENS,
        # All loads may ask the same.
        enable_prefix_caching=False,
        worker_cls=SETTINGS_WORKER if load.settings else "auto",
    )
    if load.settings:
        engine.collective_rpc("add_settings", args=(load.settings,))
    tell(Started(dtype_of(engine), sorted(os.sched_getaffinity(0))))
    for turn in iter(load.turns.recv, None):
        tell(_measure(engine, load, turn))


def _measure(engine: Any, load: Load, turn: Turn) -> Measured:
    if turn.setting is not None:
        engine.collective_rpc("use_setting", args=(turn.setting,))
    texts, size, answers = load.cases[turn.case]
    uncounted = load.warm_up * size
    first = turn.round * (size + uncounted + answers) % len(texts)
    prompts = [chat(engine, text)["prompt_token_ids"] for text in texts[first:] + texts[:first]]
    streams = Streams(engine, prompts, size, load.max_tokens, load.temperature)
    if uncounted:  # the streams get out of step, the engine into its stride
        streams.run(uncounted)
    before = counters(engine)
    measured = streams.run(answers)
    found = difference(before, counters(engine))
    streams.abort()
    return Measured(measured, found)


class Streams:
    """n requests of an engine that run at once.

    The first n are cut at different lengths: else all would end, and begin, at the same time.

    Args:
        engine: vLLM's.
        prompts: token ids of each; they begin again when they have ended.
        size: n.
        max_tokens: of an answer.
        temperature: of all requests.
    """

    def __init__(
        self,
        engine: Any,
        prompts: list[list[int]],
        size: int,
        max_tokens: int,
        temperature: float,
    ) -> None:
        self._engine = engine
        self._prompts: Iterator[list[int]] = itertools.cycle(prompts)
        self._max_tokens, self._temperature = max_tokens, temperature
        self._names = map(str, itertools.count())
        self._running: set[str] = set()
        for number in range(1, size + 1):
            self._begin(-(-max_tokens * number // size))

    def run(self, answers: int) -> Slice:
        """Let so many answers end; the streams that ended one begin the next."""
        tokens = ended = 0
        began = time.perf_counter()
        while ended < answers:
            for output in self._engine.step():
                tokens += len(output.outputs[0].token_ids)
                if output.finished:
                    ended += 1
                    self._running.remove(output.request_id)
                    self._begin(self._max_tokens)
        return Slice(tokens, time.perf_counter() - began)

    def abort(self) -> None:
        """End them all."""
        self._engine.abort_request(sorted(self._running))
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def _begin(self, max_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=self._temperature,
            max_tokens=max_tokens,
            output_kind=RequestOutputKind.DELTA,
        )
        name = next(self._names)
        self._running.add(name)
        prompt = {"prompt_token_ids": next(self._prompts)}
        self._engine.add_request(name, prompt, parameters)


def added(rounds: list[Measured]) -> dict[str, float]:
    """The counters of several rounds."""
    total: dict[str, float] = {}
    for one in rounds:
        for name, value in one.counters.items():
            total[name] = total.get(name, 0.0) + value
    return total
