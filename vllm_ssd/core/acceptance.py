"""How often drafted tokens are accepted, learned as they are verified."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

_EDGES = [0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97]
"""Chances at which one level of the correction ends and the next begins."""
_MIDDLES = [0.5 * (low + high) for low, high in zip([0.0, *_EDGES], [*_EDGES, 1.0], strict=True)]
_KNOTS = [0.0, *_MIDDLES, 1.0]
_MEMORY = 200.0
"""Observations after which an older one counts for 1 / e: a standard error of at most 0.035."""
_STATED = 20.0
"""How many observations the draft's own chance counts for, at each level: it knows a lot."""
_ASSUMED = 5.0
"""The same for a chance that nobody states: it is a guess."""


class Correction:
    """Corrects chances of acceptance by what came true, in levels of the chance.

    Between the middles of two levels it is a straight line; a greater chance stays one.
    """

    def __init__(self) -> None:
        self._said = [_STATED * middle for middle in _MIDDLES]
        self._true = list(self._said)
        self._values = list(_KNOTS)
        """The corrected chance at each knot."""

    def observe(self, chances: Sequence[float], came: Sequence[bool]) -> None:
        """Take in chances and whether each of these tokens was accepted."""
        said, true, fade = self._said, self._true, 1.0 - 1.0 / _MEMORY
        for chance, accepted in zip(chances, came, strict=True):
            level = bisect_right(_EDGES, chance)
            said[level] = said[level] * fade + chance
            true[level] = true[level] * fade + accepted
        seen = [s / middle for s, middle in zip(said, _MIDDLES, strict=True)]
        rising = _rising([t / n for t, n in zip(true, seen, strict=True)], seen)
        self._values = [min(1.0, value) for value in (0.0, *rising, rising[-1] / _MIDDLES[-1])]

    def of(self, chance: float) -> float:
        """The chance that came true so far where this one was said."""
        at = bisect_right(_KNOTS, chance, 1, len(_KNOTS) - 1)
        low, below = _KNOTS[at - 1], self._values[at - 1]
        return below + (self._values[at] - below) * (chance - low) / (_KNOTS[at] - low)

    def least(self, corrected: float) -> float:
        """The least chance whose corrected one is as great as this; infinite if there is none."""
        if corrected <= 0.0:
            return 0.0
        at = bisect_left(self._values, corrected)
        if at == len(_KNOTS):
            return float("inf")
        low, below = _KNOTS[at - 1], self._values[at - 1]
        return low + (_KNOTS[at] - low) * (corrected - below) / (self._values[at] - below)


def _rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The values, averaged where they fall: levels seldom seen follow those often seen."""
    runs: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        length = 1
        while runs and runs[-1][0] > value:
            others, its_weight, its_length = runs.pop()
            value = (value * weight + others * its_weight) / (weight + its_weight)
            weight, length = weight + its_weight, length + its_length
        runs.append((value, weight, length))
    return [value for value, _, length in runs for _ in range(length)]


class Acceptance:
    """How often a token is accepted if those before it are."""

    def __init__(self) -> None:
        self._right = self._seen = 0.0

    @property
    def chance(self) -> float:
        """The share that is accepted, half of them at first; never 0 or 1."""
        return self.given(0.5)

    def given(self, assumed: float) -> float:
        """The same, if another share is assumed at first."""
        return (_ASSUMED * assumed + self._right) / (_ASSUMED + self._seen)

    def observe(self, accepted: int, rejected: int) -> None:
        """Take in how many tokens were accepted, and how many rejected."""
        fade = (1.0 - 1.0 / _MEMORY) ** (accepted + rejected)
        self._seen = self._seen * fade + accepted + rejected
        self._right = self._right * fade + accepted
