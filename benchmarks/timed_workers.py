"""Workers and a proposer for ``step_time.py``: both kinds of engine, timed at the same place."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from vllm_ssd.target.worker import SSDWorker

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker

RECORDED = "VLLM_SSD_BENCHMARK_TEXTS"
"""Environment variable: a JSON file with the texts the target is known to write."""


class Timed:
    """Notes how long each forward takes, and over how many query tokens."""

    _times: list[tuple[int, float]]

    def execute_model(self, scheduler_output: Any) -> Any:
        """Time vLLM's own."""
        began = time.perf_counter()
        result = super().execute_model(scheduler_output)  # type: ignore[misc]
        tokens = scheduler_output.total_num_scheduled_tokens
        if not hasattr(self, "_times"):
            self._times = []
        self._times.append((tokens, time.perf_counter() - began))
        return result

    def step_times(self) -> list[tuple[int, float]]:
        """Query tokens and seconds of every forward so far."""
        return self._times


class TimedSSDWorker(Timed, SSDWorker):
    """SSD, timed. Its notices to the draft are part of the time."""


class TimedWorker(Timed, PlatformWorker):
    """Plain vLLM, timed."""


class RecordedProposer:
    """Drafts what the target is known to write: hits without a draft process."""

    def __init__(self, vllm_config: Any) -> None:
        self._depth = vllm_config.speculative_config.num_speculative_tokens
        self._texts: list[list[int]] = json.loads(Path(os.environ[RECORDED]).read_text())

    def load_model(self, target_model: Any) -> None:
        """Nothing to load."""

    def propose(
        self, sampled: list[list[int]], lengths: Any, texts: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """The recorded continuation of each row."""
        proposals = []
        for row in range(len(sampled)):
            length = int(lengths[row])
            prefix = texts[row, :length].tolist()
            match = next((t for t in self._texts if t[:length] == prefix), [])
            proposals.append(match[length : length + self._depth])
        return proposals
