"""Watches the steps of an engine of this process that uses SSD."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from typing import Any, NamedTuple

from tests.cuda.syncs import counted


class Step(NamedTuple):
    """A step of the target."""

    tokens: int
    """Query tokens."""
    seconds: float
    """From its launch until its tokens are on the host; without ``propose()``."""
    graph: str
    """vLLM's name of the kind of CUDA graph it replayed; empty without CUDA."""


def worker_of(engine: Any) -> Any:
    """The worker of an engine in this process."""
    return engine.engine_core.engine_core.model_executor.driver_worker.worker


class Waits:
    """Counts where the host waits for the device in an engine's steps, ours in them included.

    Args:
        engine: vLLM's, with either runner.
    """

    def __init__(self, engine: Any) -> None:
        worker = worker_of(engine)
        self.places: Counter[str] = Counter()
        self.steps = 0
        self._execute, self._sample = worker.execute_model, worker.sample_tokens
        worker.execute_model, worker.sample_tokens = self.execute_model, self.sample_tokens

    def execute_model(self, scheduler_output: Any) -> Any:
        """The worker's own, which launches a step."""
        self.steps += 1
        return self._watch(self._execute, scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The worker's own, which ends it, drafts for the next step included."""
        return self._watch(self._sample, grammar_output)

    def _watch(self, call: Any, argument: Any) -> Any:
        with counted() as places:
            result = call(argument)
        self.places.update(places)
        return result


class Steps:
    """Notes every step, on V1; and, while there is a record of the texts, has that proposed: the
    target verifies the same tokens and the draft has nothing to do.

    Args:
        engine: vLLM's.
        depth: K.
    """

    def __init__(self, engine: Any, depth: int) -> None:
        worker = worker_of(engine)
        drafter = worker.model_runner.drafter
        self.record: list[list[int]] | None = None
        self.steps: list[Step] = []
        self._depth = depth
        self._execute, self._sample = worker.execute_model, worker.sample_tokens
        self._scheduled, self._propose = drafter.scheduled, drafter.propose
        self._began = self._proposing = 0.0
        self._tokens = 0
        worker.execute_model, worker.sample_tokens = self.execute_model, self.sample_tokens
        drafter.scheduled, drafter.propose = self.scheduled, self.propose

    def execute_model(self, scheduler_output: Any) -> Any:
        """The worker's own, which launches a step."""
        self._began, self._proposing = time.perf_counter(), 0.0
        self._tokens = scheduler_output.total_num_scheduled_tokens
        return self._execute(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The worker's own, which ends it, drafts for the next step included."""
        output = self._sample(grammar_output)
        seconds = time.perf_counter() - self._began - self._proposing
        graph = getattr(output, "cudagraph_stats", None)
        self.steps.append(Step(self._tokens, seconds, graph.runtime_mode if graph else ""))
        return output

    def scheduled(self, scheduler_output: Any) -> None:
        """The proposer's own, of requests that SSD is used for."""
        if self.record is not None:
            scheduler_output = dataclasses.replace(scheduler_output, scheduled_new_reqs=[])
        self._scheduled(scheduler_output)

    def propose(
        self, sampled: list[list[int]], lengths: Any, texts: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """The proposer's own, or what the record says follows each row."""
        began = time.perf_counter()
        if self.record is None:
            proposals: list[list[int]] = self._propose(sampled, lengths, texts, slot_mappings)
        else:
            rows = range(len(sampled))
            proposals = [self._recorded(texts[row, : int(lengths[row])].tolist()) for row in rows]
        self._proposing += time.perf_counter() - began
        return proposals

    def _recorded(self, text: list[int]) -> list[int]:
        length = len(text)
        for known in self.record or ():
            if known[:length] == text:
                return known[length : length + self._depth]
        return []
