"""How many of the drafted tokens to verify, over all requests of a batch.

A verification of m drafted tokens yields one token a request and, on average, one for each drafted
token times the chance that it and all before it are accepted. It takes ``time(m)``. The most
probable tokens come first; m is where the expected tokens per second are highest.

Whether a sampled token is verified may not depend on which token it is. The chances of the tokens
after it do: so they decide about themselves alone. Given that there is a verification of drafted
tokens, that is so by itself: the rate rises up to m and falls from there on, so what decides about
a token are the chances above its own. But whether there is one at all depends on the sum of all
chances: where tokens are sampled, it is decided by the first chance of each request, and what
usually comes after it (:meth:`Lengths.choose`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arrays import Float64Array
from vllm_ssd.core.step_times import Forecast

_FEW = 16
"""For up to so many tokens loops are faster than arrays."""
_EDGES = [0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97]
"""Chances at which one level of the correction ends and the next begins."""
_MIDDLES = [0.5 * (low + high) for low, high in zip([0.0, *_EDGES], [*_EDGES, 1.0], strict=True)]
_KNOTS = [0.0, *_MIDDLES, 1.0]
_ONWARD = 0.5
"""The mean chance of tokens after the first, until some were verified."""
_SMOOTHING = 0.05
"""Weight of the newest verification in that."""
_PRIOR = 20.0
"""How many observations the draft's own chance counts for, at each level."""
_DECAY = 1.0 - 1.0 / 1000
"""By which each observation fades the older ones of its level."""


class Correction:
    """Corrects chances of acceptance by what came true, in levels of the chance.

    Between the middles of two levels it is a straight line; a greater chance stays one.
    """

    def __init__(self) -> None:
        self._said = [_PRIOR * middle for middle in _MIDDLES]
        self._true = list(self._said)
        self._values = list(_KNOTS)
        """The corrected chance at each knot."""
        self._knots, self._array = np.array(_KNOTS), np.array(_KNOTS)

    def observe(self, chances: Sequence[float], came: Sequence[bool]) -> None:
        """Take in chances and whether each of these tokens was accepted."""
        said, true = self._said, self._true
        for chance, accepted in zip(chances, came, strict=True):
            level = bisect_right(_EDGES, chance)
            said[level] = said[level] * _DECAY + chance
            true[level] = true[level] * _DECAY + accepted
        factors = [t / s for t, s in zip(true, said, strict=True)]
        corrected = [f * m for f, m in zip(factors, _MIDDLES, strict=True)]
        rising = accumulate([0.0, *corrected, factors[-1]], max)
        self._values = [min(1.0, value) for value in rising]
        self._array = np.array(self._values)

    def of(self, chance: float) -> float:
        """The chance that came true so far where this one was said."""
        at = bisect_right(_KNOTS, chance, 1, len(_KNOTS) - 1)
        low, below = _KNOTS[at - 1], self._values[at - 1]
        return below + (self._values[at] - below) * (chance - low) / (_KNOTS[at] - low)

    def of_all(self, chances: Float64Array) -> Float64Array:
        """The same for an array."""
        return np.interp(chances, self._knots, self._array)


class Chosen(NamedTuple):
    """How many tokens of each request are verified, and what is expected of it."""

    counts: list[int]
    rate: float
    """Expected tokens per second; 0.0 if no time is known."""
    rate_of_all: float
    """The same if all tokens were verified."""


class Lengths:
    """Chooses how many drafted tokens to verify; learns how far the draft's chances are right."""

    def __init__(self) -> None:
        self.correction = Correction()
        self._tried, self._right = _PRIOR, 0.3 * _PRIOR
        self._onward = _ONWARD
        """The mean chance of tokens after the first."""

    @property
    def usual(self) -> float:
        """The chance that a token is accepted after those before it, where nobody states one."""
        return self._right / self._tried

    def choose(
        self,
        requests: float,
        stated: Sequence[Sequence[float]],
        forecast: Forecast,
        besides: float = 0.0,
        sampled: int = 0,
    ) -> Chosen:
        """How many of each request's drafted tokens to verify.

        Args:
            requests: those of the batch, with or without drafted tokens; more if tokens are
                expected besides.
            stated: for some of them, for each token the chance that it is accepted if those before
                it are.
            forecast: what the verification takes.
            besides: seconds that a round takes besides.
            sampled: K if any of these tokens may be sampled, else 0.
        """
        if not forecast.base:
            return Chosen([len(of) for of in stated], 0.0, 0.0)
        if sampled:
            if not self._usually_pays(requests, stated, forecast, besides, sampled):
                of_all = self.choose(requests, stated, forecast, besides).rate_of_all
                plain = requests / (forecast.plain + besides)
                return Chosen([0] * len(stated), plain, of_all)
            forecast = forecast._replace(plain=math.inf)  # some are verified in any case
        if sum(map(len, stated)) > _FEW:
            said = _table(stated).cumprod(axis=1)
            return _choose_many(requests, self.correction.of_all(said), stated, forecast, besides)
        correct = self.correction.of
        chances = [[correct(chance) for chance in cumulative(of)] for of in stated]
        return _choose_few(requests, chances, forecast, besides)

    def _usually_pays(
        self,
        requests: float,
        stated: Sequence[Sequence[float]],
        forecast: Forecast,
        besides: float,
        depth: int,
    ) -> bool:
        """Whether a verification usually pays where first tokens have such chances."""
        usual = [[of[0], *[self._onward] * (depth - 1)] for of in stated if of]
        return any(self.choose(requests, usual, forecast, besides).counts)

    def observe(self, stated: Sequence[Sequence[float]], accepted: Sequence[int]) -> None:
        """Take in how many of each request's verified tokens were accepted.

        Args:
            stated: as for :meth:`choose`, of the tokens that were verified.
            accepted: how many of them.
        """
        said: list[float] = []
        came: list[bool] = []
        onward = [chance for chances in stated for chance in chances[1:]]
        if onward:
            self._onward += _SMOOTHING * (sum(onward) / len(onward) - self._onward)
        for chances, count in zip(stated, accepted, strict=True):
            said += cumulative(chances)
            came += [True] * count + [False] * (len(chances) - count)
        self.correction.observe(said, came)

    def observe_unstated(self, tried: int, accepted: int) -> None:
        """Take in tokens without a stated chance, all those before which were accepted."""
        fade = _DECAY**tried
        self._tried = self._tried * fade + tried
        self._right = self._right * fade + accepted


def cumulative(stated: Sequence[float]) -> list[float]:
    """The chance of each token that it and all before it are accepted."""
    return list(accumulate(stated, mul))


def choose_lengths(
    requests: int, chances: Sequence[Sequence[float]], forecast: Forecast, besides: float = 0.0
) -> Chosen:
    """How many of each request's drafted tokens to verify.

    Args:
        requests: those of the batch, with or without drafted tokens.
        chances: for some of them, for each token the chance that it and all before it are accepted;
            never rising along a request.
        forecast: what the verification takes.
        besides: seconds that a round takes besides.
    """
    if sum(map(len, chances)) > _FEW:
        return _choose_many(requests, _table(chances), chances, forecast, besides)
    return _choose_few(requests, chances, forecast, besides)


def _choose_few(
    requests: float, chances: Sequence[Sequence[float]], forecast: Forecast, besides: float
) -> Chosen:
    best = rate = requests / (forecast.plain + besides)
    tokens, seconds, each = requests, forecast.base + besides, forecast.each
    # Of equal chances the one that comes first in its proposal, then that of the first request.
    ranked = sorted(
        (-chance, at, i) for i, of in enumerate(chances) for at, chance in enumerate(of)
    )
    most = 0
    for m, (chance, _, _) in enumerate(ranked, 1):
        tokens -= chance
        seconds += each
        rate = tokens / seconds
        if rate > best:
            best, most = rate, m
    counts = [0] * len(chances)
    for _, _, i in ranked[:most]:
        counts[i] += 1
    return Chosen(counts, best, rate)


_NUMBERS = np.arange(1.0, 4097.0)


def _choose_many(
    requests: float,
    table: Float64Array,
    chances: Sequence[Sequence[float]],
    forecast: Forecast,
    besides: float,
) -> Chosen:
    """The same for ``[requests with tokens, the most of them]`` chances, filled up with 0."""
    total = sum(map(len, chances))
    by_position = table.T.ravel()
    order = np.argsort(-by_position, kind="stable")[:total]  # ties as in _choose_few
    ranked = by_position[order]
    numbers = _NUMBERS[:total] if total <= len(_NUMBERS) else np.arange(1.0, total + 1.0)
    seconds = numbers * forecast.each
    seconds += forecast.base + besides
    tokens = ranked.cumsum()
    tokens += requests
    rates = tokens / seconds
    at = int(rates.argmax())
    best, plain, of_all = float(rates[at]), requests / (forecast.plain + besides), float(rates[-1])
    if best <= plain or ranked[at] <= 0.0:
        return Chosen([0] * len(chances), plain, of_all)
    counts: list[int] = np.bincount(order[: at + 1] % len(table), minlength=len(table)).tolist()
    return Chosen(counts, best, of_all)


def _table(rows: Sequence[Sequence[float]]) -> Float64Array:
    """Rows of different lengths as one array, filled up with 0."""
    widest = max(map(len, rows))
    zeros = [0.0] * widest
    return np.array([[*row, *zeros[len(row) :]] if len(row) < widest else row for row in rows])
