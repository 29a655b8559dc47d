"""The part of PromQL that the dashboard uses, over samples taken from ``/metrics``.

Numbers, ``+``, ``/``, a metric's name, ``rate`` and ``increase`` over a range, ``sum``, ``min``,
``sum by (label)`` and ``histogram_quantile``. Everything else is a :class:`ValueError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
"""A value for each set of labels; a number has no labels."""


class Sample(NamedTuple):
    """All that ``/metrics`` said at one moment."""

    time: float
    """Seconds."""
    values: dict[str, Vector]
    """By name."""


Query = Callable[[list[Sample]], Vector]
"""What it gives at the time of the last sample."""

TOKEN = re.compile(r"\s*([A-Za-z_:][\w:]*|[\d.]+|\[[^\]]*\]|[-+/(),])")
NUMBER = re.compile(r"[\d.]+")


def parse(text: str, rate_interval: float) -> Query:
    """A query.

    Args:
        text: PromQL.
        rate_interval: seconds of Grafana's ``$__rate_interval``.

    Raises:
        ValueError: it uses something else than the above.
    """
    tokens, position = [], 0
    while position < len(text.rstrip()):
        found = TOKEN.match(text, position)
        if found is None:
            raise ValueError(f"{text[position:]!r} in {text!r}")
        tokens.append(found[1])
        position = found.end()
    parser = _Parser(tokens, rate_interval)
    query = parser.sum_of_terms()
    if parser.rest:
        raise ValueError(f"{' '.join(parser.rest)!r} in {text!r}")
    return query


class _Parser:
    def __init__(self, tokens: list[str], rate_interval: float) -> None:
        self.rest = tokens
        self._rate_interval = rate_interval

    def sum_of_terms(self) -> Query:
        left = self._quotient()
        while self._at("+"):
            left = _binary(left, self._quotient(), lambda a, b: a + b)
        return left

    def _quotient(self) -> Query:
        left = self._term()
        while self._at("/"):
            left = _binary(left, self._term(), lambda a, b: a / b if b else math.nan)
        return left

    def _term(self) -> Query:
        token = self._next()
        if NUMBER.fullmatch(token):
            return lambda samples: {frozenset(): float(token)}
        match token:
            case "rate" | "increase":
                return self._over_range(token)
            case "sum" | "min":
                return self._aggregate(sum if token == "sum" else min)
            case "histogram_quantile":
                return self._quantile()
            case _:
                return lambda samples: samples[-1].values.get(token, {})

    def _over_range(self, function: str) -> Query:
        self._expect("(")
        name, span = self._next(), self._next().strip("[]")
        self._expect(")")
        seconds = self._rate_interval if span == "$__rate_interval" else 60.0 * int(span[:-1])
        if span[-1] != "m" and span != "$__rate_interval":
            raise ValueError(f"a range in {span!r}: only minutes are known")

        def query(samples: list[Sample]) -> Vector:
            grown, elapsed = _increase(samples, name, seconds)
            if function == "increase" or not elapsed:
                return grown
            return {labels: value / elapsed for labels, value in grown.items()}

        return query

    def _aggregate(self, function: Callable[[list[float]], float]) -> Query:
        label = None
        if self._at("by"):
            self._expect("(")
            label = self._next()
            self._expect(")")
        self._expect("(")
        inner = self.sum_of_terms()
        self._expect(")")

        def query(samples: list[Sample]) -> Vector:
            groups: dict[Labels, list[float]] = {}
            for labels, value in inner(samples).items():
                key = frozenset(pair for pair in labels if pair[0] == label)
                groups.setdefault(key, []).append(value)
            return {key: function(values) for key, values in groups.items()}

        return query

    def _quantile(self) -> Query:
        self._expect("(")
        part = float(self._next())
        self._expect(",")
        inner = self.sum_of_terms()
        self._expect(")")
        return lambda samples: {frozenset(): _quantile_of(inner(samples), part)}

    def _next(self) -> str:
        if not self.rest:
            raise ValueError("the query ends too early")
        return self.rest.pop(0)

    def _at(self, token: str) -> bool:
        if self.rest[:1] != [token]:
            return False
        del self.rest[0]
        return True

    def _expect(self, token: str) -> None:
        if not self._at(token):
            raise ValueError(f"{token!r} is missing before {' '.join(self.rest)!r}")


def _binary(left: Query, right: Query, function: Callable[[float, float], float]) -> Query:
    def query(samples: list[Sample]) -> Vector:
        first, second = left(samples), right(samples)
        return {key: function(first[key], second[key]) for key in first.keys() & second.keys()}

    return query


def _increase(samples: list[Sample], name: str, seconds: float) -> tuple[Vector, float]:
    """What counters have grown by in the last seconds, and how long that was."""
    window = [one for one in samples if one.time >= samples[-1].time - seconds]
    grown: Vector = {}
    for before, after in pairwise(window):
        old = before.values.get(name, {})
        for labels, value in after.values.get(name, {}).items():
            # A counter that has fallen began anew.
            step = value - old.get(labels, 0.0)
            grown[labels] = grown.get(labels, 0.0) + (step if step >= 0 else value)
    return grown, window[-1].time - window[0].time


def _quantile_of(buckets: Vector, part: float) -> float:
    """Of a histogram, linear within a bucket, as Prometheus does it."""
    counts = sorted((float(dict(labels)["le"]), count) for labels, count in buckets.items())
    if not counts or not counts[-1][1]:
        return math.nan
    wanted = part * counts[-1][1]
    below, count_below = 0.0, 0.0
    for bound, count in counts:
        if count >= wanted:
            if math.isinf(bound):
                return below
            return below + (bound - below) * (wanted - count_below) / (count - count_below)
        below, count_below = bound, count
    return below
