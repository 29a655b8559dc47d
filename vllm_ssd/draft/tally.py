"""The draft's counters: its steps, each target's rounds, and what they took."""

from __future__ import annotations

import time

from vllm_ssd.core.recent import Recent
from vllm_ssd.draft.pipeline import Taken

STEP_COUNTERS = (
    "draft_steps",
    "draft_step_seconds",
    "draft_python_seconds",
    "draft_rows",
    "draft_prefill_tokens",
    "draft_graph_steps",
)
ROUND_COUNTERS = (
    "draft_plan_seconds",
    "draft_rounds",
    "draft_rounds_cut",
    "draft_round_seconds",
    "draft_forks",
    "draft_given_up",
    "draft_narrowed",
    "draft_evictions",
)


class StepTally:
    """Counts the steps of a draft."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = dict.fromkeys(STEP_COUNTERS, 0.0)
        self.steps = Recent()
        """Seconds of each."""
        self._counted = 0.0
        """When the newest step was counted."""

    def step(self, taken: Taken, model_seconds: float, graph_steps: int) -> float:
        """Count a step.

        Args:
            taken: the step.
            model_seconds: what launches and waits have taken since the start.
            graph_steps: how many forwards have replayed a CUDA graph since the start.

        Returns:
            The seconds it took.
        """
        now = time.perf_counter()
        # A step launched ahead has the device to itself only after the one before.
        seconds = now - max(taken.began, self._counted)
        self._counted = now
        counters = self.counters
        counters["draft_steps"] += 1
        counters["draft_rows"] += len(taken.decoding)
        counters["draft_prefill_tokens"] += taken.prefilled
        counters["draft_step_seconds"] += seconds
        counters["draft_graph_steps"] = float(graph_steps)
        self.steps.add(seconds)
        counters["draft_python_seconds"] = counters["draft_step_seconds"] - model_seconds
        return seconds


class RoundTally:
    """Counts the rounds of a target. One ends with its last branch, or when it is cut."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = dict.fromkeys(ROUND_COUNTERS, 0.0)
        self._round_began: float | None = None

    @property
    def in_round(self) -> bool:
        """Whether a round is under way."""
        return self._round_began is not None

    def reset(self) -> None:
        """The round under way is not counted."""
        self._round_began = None

    def plan(self, seconds: float) -> None:
        """What it took to follow outcomes and to plan and fork the next trees."""
        self.counters["draft_plan_seconds"] += seconds

    def begin_round(self, began: float) -> None:
        """A round has begun, at this time of ``time.perf_counter``."""
        self._round_began = began

    def cut_round(self) -> None:
        """End a round that is still being drafted when the next outcomes arrive."""
        if self._round_began is not None:
            self.counters["draft_rounds_cut"] += 1
            self.end_round()

    def end_round(self) -> None:
        """Count the round under way, if there is one."""
        if self._round_began is not None:
            self.counters["draft_rounds"] += 1
            self.counters["draft_round_seconds"] += time.perf_counter() - self._round_began
            self._round_began = None
