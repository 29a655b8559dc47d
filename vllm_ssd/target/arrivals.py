"""What the draft reports of its work, applied in the order in which it comes."""

from __future__ import annotations

import numpy as np

from vllm_ssd.core.stats import Stats
from vllm_ssd.target.counters import DraftCounters
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.wire.messages import Alive, Forked, Planted, Pruned, Report, Stepped, ToTarget


class Arrivals:
    """Applies messages to the published trees and the counters.

    Args:
        published: the target's copy of the trees.
        counters: of the draft.
        stats: the target's counters.
    """

    def __init__(self, published: PublishedTrees, counters: DraftCounters, stats: Stats) -> None:
        self._published = published
        self._counters = counters
        self._stats = stats
        self._steps: list[Stepped] = []
        """Received and not applied yet."""

    def clear(self) -> None:
        """A new epoch: what was not applied belongs to the last one."""
        self._steps.clear()

    def take(self, message: ToTarget) -> bool:
        """Apply a message, steps with the next :meth:`flush`; False if it is of another kind.

        Raises:
            ValueError: it does not make sense.
            IndexError: the same.
        """
        if isinstance(message, Stepped):
            self._steps.append(message)
            return True
        self.flush()
        match message:
            case Planted():
                self._published.plant(message)
            case Forked():
                self._published.fork(message)
            case Pruned():
                self._published.prune(message)
            case Report():
                self._counters.take(message)
                steps = np.frombuffer(message.step_seconds, np.float32)
                self._stats.recent["draft_step_seconds"].extend(steps.tolist())
            case Alive():
                pass
            case _:
                return False
        return True

    def flush(self) -> None:
        """Apply the decode steps that have come in a row, as one. Raises as :meth:`take`."""
        if self._steps:
            steps, self._steps = self._steps, []
            self._published.steps(steps)
