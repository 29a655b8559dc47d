"""A worker and a proposer for ``step_time.py``: one engine, drafting or not, timed at one place."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from vllm_ssd.target.v1.proposer import SSDProposer
from vllm_ssd.target.v1.worker import SSDWorker


class SwitchedProposer(SSDProposer):
    """SSD's; or, while there is a record of the text, that record: the draft gets no messages."""

    record: list[list[int]] | None = None

    def scheduled(self, scheduler_output: Any) -> None:
        """SSD's own, of requests that SSD is used for."""
        if self.record is not None:
            scheduler_output = dataclasses.replace(scheduler_output, scheduled_new_reqs=[])
        super().scheduled(scheduler_output)

    def propose(
        self, sampled: list[list[int]], lengths: Any, texts: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """SSD's own, or the recorded continuation of each row."""
        if self.record is None:
            return super().propose(sampled, lengths, texts, slot_mappings)
        proposals = []
        for row in range(len(sampled)):
            length = int(lengths[row])
            prefix = texts[row, :length].tolist()
            match = next((text for text in self.record if text[:length] == prefix), [])
            proposals.append(match[length : length + self.rounds.depth])
        return proposals


class TimedWorker(SSDWorker):
    """Notes how long each forward takes, notices to the draft included, and its query tokens."""

    _times: list[tuple[int, float]]

    def execute_model(self, scheduler_output: Any) -> Any:
        """Time SSD's own."""
        began = time.perf_counter()
        result = super().execute_model(scheduler_output)
        self._times.append(
            (scheduler_output.total_num_scheduled_tokens, time.perf_counter() - began)
        )
        return result

    def start_timing(self, record: list[list[int]] | None) -> None:
        """Forget the times, and draft from now on with SSD (None) or from a record of texts."""
        self._times = []
        self._proposer.record = record  # type: ignore[attr-defined]

    def step_times(self) -> list[tuple[int, float]]:
        """Query tokens and seconds of every forward since."""
        return self._times
