"""What a step of the target takes, by its requests and drafted tokens, fitted while it runs."""

from __future__ import annotations

from typing import NamedTuple

_FEW = 8
"""With fewer steps than this, a line does not know yet what an outlier is."""
_OUTLIER = 2.5
"""So many mean deviations from the line (two standard errors) count as no more than that."""
_NEAR = 16
"""The same as ``memory``, for how high a line lies: that follows the load of the machine."""
_PRIOR = 3.0
"""Spread of the tokens, squared and summed, with which a slope counts for as much as the one that
is assumed before: that of two steps two or three tokens apart."""


def level_of(requests: int) -> int:
    """The level of a batch size: 1, 2, 3 to 4, 5 to 8, ... are levels 0, 1, 2, 3, ..."""
    return (requests - 1).bit_length()


class Line:
    """Seconds of a step as a straight line over its tokens, exponentially weighted.

    How steep it is follows from how each step differs from the one two before it: on a machine with
    other programs, a slow while has deeper drafts too, and more tokens would look slower than they
    are. Not from the one just before it: if that took long, the draft had time for more tokens of
    this one, and they would look faster than they are. How high it lies is forgotten much sooner.

    Steps far off the line (a pause, another program) are taken in as if they were less far, and a
    lasting change is followed all the same, since the usual deviation grows with them.

    Args:
        memory: number of steps after which the weight of an older one has fallen to 1 / e, for
            the slope: of those that differ from the other one in their tokens.
    """

    __slots__ = (
        "_before",
        "_cross",
        "_deviation",
        "_memory",
        "_pairs",
        "_spread",
        "mean",
        "seen",
        "tokens",
    )

    def __init__(self, memory: int = 100) -> None:
        self._memory = memory
        self._pairs = self.seen = 0
        """Steps taken in, at most ``memory``."""
        self.tokens = self.mean = 0.0
        """The means of the newest steps' tokens and seconds."""
        self._before: tuple[tuple[float, float], ...] = ()
        """Tokens and seconds of the last two steps, the older one first."""
        self._spread = self._cross = self._deviation = 0.0

    @property
    def vague(self) -> bool:
        """Whether the steps were so alike that nothing is known of the slope."""
        return self.seen >= _FEW // 2 and self._pairs * self._spread < _PRIOR

    def slope(self, usual: float = 0.0) -> float:
        """Seconds a token; ``usual`` is what it is until enough is known.

        More tokens never make a step cheaper: a negative slope is noise.
        """
        cross = self._pairs * self._cross + _PRIOR * usual
        return max(0.0, cross / (self._pairs * self._spread + _PRIOR))

    def at(self, tokens: float, slope: float | None = None) -> float:
        """Seconds of a step of so many tokens, a tenth of the mean at least.

        Args:
            tokens: of the step.
            slope: another one than the line's.
        """
        each = self.slope() if slope is None else slope
        return max(self.mean + each * (tokens - self.tokens), 0.1 * self.mean)

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in one step."""
        if self.seen:
            expected = self.mean + self.slope() * (tokens - self.tokens)
            off = seconds - expected
            if self.seen < _FEW:
                if off < -0.5 * expected:
                    self.seen = 0  # what came before were no usual steps
                off = min(off, expected)
            else:
                most = _OUTLIER * self._deviation + 1e-3 * expected
                off = min(max(off, -most), most)
            seconds = seconds if not self.seen else expected + off
            self._deviation += (abs(off) - self._deviation) / min(self.seen + 1, 20)
        if not self.seen:
            self.tokens, self.mean = tokens, seconds
            self._before = ((tokens, seconds),)
            self._spread = self._cross = 0.0
            self._pairs = 0
            self._deviation = 0.1 * seconds
            self.seen = 1
            return
        self.seen = min(self.seen + 1, self._memory)
        local = max(1.0 / self.seen, 1.0 / _NEAR)
        self.tokens += local * (tokens - self.tokens)
        self.mean += local * (seconds - self.mean)
        if len(self._before) == 2:
            self._compare(tokens - self._before[0][0], seconds - self._before[0][1])
        self._before = (self._before[-1], (tokens, seconds))

    def _compare(self, beside: float, above: float) -> None:
        """Take in how a step differs from another one in its tokens and seconds."""
        if beside:
            self._pairs = min(self._pairs + 1, self._memory)
            # Of two steps each: half as much is known of a difference.
            self._spread += (0.5 * beside * beside - self._spread) / self._pairs
            self._cross += (0.5 * beside * above - self._cross) / self._pairs


class Forecast(NamedTuple):
    """What the next step takes, in seconds, by the drafted tokens that it verifies."""

    plain: float
    """Without any."""
    base: float
    each: float
    """With m > 0 of them: ``base + each m``."""

    def of(self, drafted: int) -> float:
        """With so many drafted tokens."""
        return self.base + self.each * drafted if drafted else self.plain


class StepTimes:
    """The measured times of the target's steps.

    Each level of the batch size has a line over the step's tokens (one a request and the drafted
    ones), and one for plain steps, which may run other kernels. A line over all levels stands in
    where a level has seen nothing, and gives the slope where it has seen little.
    """

    def __init__(self) -> None:
        self._all = Line(memory=200)
        self._verifying: dict[int, Line] = {}
        self._plain: dict[int, Line] = {}
        self._quiet: dict[int, Line] = {}
        """Plain steps while the draft was at rest."""

    def observe(self, requests: int, drafted: int, seconds: float) -> None:
        """Take in a step in which all requests decoded.

        Args:
            requests: its requests.
            drafted: the drafted tokens that it verified, over all requests.
            seconds: from the proposal before it to its result.
        """
        self._all.observe(requests + drafted, seconds)
        lines = self._verifying if drafted else self._plain
        lines.setdefault(level_of(requests), Line()).observe(requests + drafted, seconds)

    def observe_quiet(self, requests: int, seconds: float) -> None:
        """Take in a plain step while the draft was at rest."""
        self._all.observe(requests, seconds)
        self._quiet.setdefault(level_of(requests), Line()).observe(requests, seconds)

    def vague(self, requests: int) -> bool:
        """Whether steps of other numbers of drafted tokens are needed to know what one costs."""
        line = self._verifying.get(level_of(requests))
        return line is not None and line.vague

    def usual(self, tokens: int) -> float:
        """Seconds of a step of so many tokens, whatever it verifies; 0.0 if nothing is known."""
        return self._all.at(tokens)

    def plain(self, requests: int) -> float:
        """Seconds of a plain step; 0.0 if this level has not seen any.

        While the draft is at work, if such a step has been seen; else while it was at rest.
        """
        level = level_of(requests)
        line = self._plain.get(level) or self._quiet.get(level)
        return 0.0 if line is None else line.at(requests, self._all.slope())

    def forecast(self, requests: int) -> Forecast:
        """The next step's time with so many requests; zeros if nothing is known."""
        every = self._all
        line = self._verifying.get(level_of(requests))
        if line is None:
            # Nothing verified at this level: other levels' slope from a plain step on.
            plain = self.plain(requests) or self.usual(requests)
            return Forecast(plain, plain, every.slope())
        # What plain steps and other levels say of a token, until this level knows better.
        each = line.slope(every.slope())
        if plain := self.plain(requests):
            # A token among others costs no more than one of a plain step.
            each = min(each, plain / requests)
        base = line.at(requests, each)
        return Forecast(plain or base, base, each)
