"""Tokens per second of engines that took turns, and of one against another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Slice(NamedTuple):
    """What an engine did in a part of the time."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Rate(NamedTuple):
    """Tokens per second of an engine under one load, over all rounds."""

    mean: float
    """All tokens by all seconds."""
    rounds: list[float]
    """Of each round."""

    @classmethod
    def of(cls, rounds: Sequence[Slice]) -> Rate:
        """From what it did in each round."""
        whole = Slice(sum(one.tokens for one in rounds), sum(one.seconds for one in rounds))
        return cls(whole.rate, [one.rate for one in rounds])

    def __str__(self) -> str:
        """``"68.7 ±2%"``: half the difference between the rounds, if there are several."""
        if len(self.rounds) == 1:
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} ±{(max(self.rounds) - min(self.rounds)) / 2 / self.mean:.0%}"


class Ratio(NamedTuple):
    """Tokens per second of one engine to those of another, under the same load.

    Rounds are compared one by one, since both engines had their turns in one within seconds, with
    the same prompts: what changes from round to round is in neither figure.
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
        error = "" if self.error is None else f" ±{self.mean * self.error:.2f}"
        return f"{self.mean:.2f}{error}"

    def difference(self) -> str:
        """``"+1.2% ±0.8%"``."""
        error = "" if self.error is None else f" ±{self.error:.1%}"
        return f"{self.mean - 1:+.1%}{error}"
