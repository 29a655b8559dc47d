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
from dataclasses import dataclass
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


class Case(NamedTuple):
    """One load."""

    prompts: list[str]
    """They begin again when they have ended."""
    size: int
    """n, the requests that run."""
    slices: int
    """How long it is measured: the time in which n answers end is a slice."""


@dataclass(kw_only=True)
class Load(EngineSpec):
    """What to start, and the loads to put on it when told to."""

    cases: list[Case]
    turns: Connection
    """Says which case is next, by its number; None: that was the last."""
    max_tokens: int
    """Of an answer; it may end before."""
    temperature: float
    warm_up: int = 1
    """How many slices are not counted before those that are."""


class Measured(NamedTuple):
    """What one load gave."""

    slices: list[Slice]
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
    engine = start_engine(
        load,
        kv_cache_memory_bytes=KV_BYTES,
        max_num_seqs=max(case.size for case in load.cases),
        max_num_batched_tokens=PREFILL_TOKENS,
        # All loads may ask the same.
        enable_prefix_caching=False,
    )
    tell(Started(dtype_of(engine), sorted(os.sched_getaffinity(0))))
    for number in iter(load.turns.recv, None):
        tell(_measure(engine, load.cases[number], load))


def _measure(engine: Any, case: Case, load: Load) -> Measured:
    prompts = [chat(engine, prompt)["prompt_token_ids"] for prompt in case.prompts]
    streams = Streams(engine, prompts, case.size, load.max_tokens, load.temperature)
    for _ in range(load.warm_up):  # the streams get out of step, the engine into its stride
        streams.run(case.size)
    before = counters(engine)
    slices = [streams.run(case.size) for _ in range(case.slices)]
    found = difference(before, counters(engine))
    streams.abort()
    return Measured(slices, found)


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
