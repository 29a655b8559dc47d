"""Tokens per second of engines that took turns, and of one against another."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple


class Slice(NamedTuple):
    """A part of the measured time."""

    tokens: int
    seconds: float


class Rate(NamedTuple):
    """Tokens per second of an engine under one load, over all rounds."""

    median: float
    """Of the slices: see :func:`rate`."""
    rounds: list[float]
    """Of each round as a whole."""

    def __str__(self) -> str:
        """``"68.7 ±2%"``: half the difference between the rounds, if there are several."""
        if len(self.rounds) == 1:
            return f"{self.median:.1f}"
        return f"{self.median:.1f} ±{(max(self.rounds) - min(self.rounds)) / 2 / self.median:.0%}"


class Ratio(NamedTuple):
    """Tokens per second of one engine to those of another, under the same load.

    Rounds are compared one by one, since both engines had their turns in one within seconds: what
    changed on the machine between the rounds is in neither figure.
    """

    mean: float
    """The rounds' geometric mean."""
    error: float | None
    """Its standard error, relative; None from a single round."""

    @classmethod
    def of(cls, one: Rate, other: Rate) -> Ratio:
        """Compare two engines that took turns."""
        logs = [math.log(a / b) for a, b in zip(one.rounds, other.rounds, strict=True)]
        error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None
        return cls(math.exp(statistics.mean(logs)), error)

    def __str__(self) -> str:
        """``"1.23 ±0.01"``."""
        return f"{self.mean:.2f}" + (
            "" if self.error is None else f" ±{self.mean * self.error:.2f}"
        )

    def difference(self) -> str:
        """``"+1.2% ±0.8%"``."""
        return f"{self.mean - 1:+.1%}" + ("" if self.error is None else f" ±{self.error:.1%}")


def rate(rounds: list[list[Slice]]) -> Rate:
    """Tokens per second from several rounds with the same slices.

    A slice is the same work in every round, so of its rates the median is taken, which leaves out
    what disturbed one round; the slices, which are different work, are then added up.

    Args:
        rounds: the slices of each.
    """
    tokens = seconds = 0.0
    for same in zip(*rounds, strict=True):
        produced = statistics.mean(one.tokens for one in same)
        tokens += produced
        seconds += produced / statistics.median(one.tokens / one.seconds for one in same)
    totals = [total(one) for one in rounds]
    return Rate(tokens / seconds, totals)


def total(slices: list[Slice]) -> float:
    """Tokens per second of one round."""
    return sum(one.tokens for one in slices) / sum(one.seconds for one in slices)
