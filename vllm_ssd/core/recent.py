"""The newest values of something that is measured, for histograms."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

KEPT = 1024
"""Values kept; whoever reads once a second misses none below this rate."""


class Recent:
    """Values in the order in which they were measured, the newest ``KEPT`` of them."""

    __slots__ = ("_values", "count")

    def __init__(self) -> None:
        self.count = 0
        """Of all values since the start."""
        self._values: deque[float] = deque(maxlen=KEPT)

    def add(self, value: float) -> None:
        """Take in one value."""
        self.count += 1
        self._values.append(value)

    def extend(self, values: Iterable[float]) -> None:
        """Take in several."""
        for value in values:
            self.add(value)

    def since(self, count: int) -> list[float]:
        """The values after the first ``count``, as far as they are kept."""
        new = min(self.count - count, len(self._values))
        return list(self._values)[len(self._values) - new :] if new > 0 else []
