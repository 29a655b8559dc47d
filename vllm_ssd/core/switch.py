"""Whether to speculate at all, or to decode plainly: by the tokens per second of each.

Both ways are compared as they run, with all that belongs to them: the draft's traffic on the memory
that both share, look-ups, waits. The one that is not in use is tried for a few rounds now and then
(a *probe*). What is known is one number, the logarithm of their ratio, with its variance: a probe
narrows it, time widens it again. So a stale figure never decides, and noise does not either.

A probe costs what the other way is slower. All probes together may take a small share of the time:
the worse the other way is believed to be, the rarer they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vllm_ssd.core.credit import Credit
from vllm_ssd.core.step_times import level_of

_SHARE = 0.005
"""Of the time, what probes may cost: all that is tried in vain shall stay below 1 %."""
_SHORTEST_PROBE, _PROBE_ROUNDS, _LONGEST_PROBE = 2, 8, 64
"""Rounds of a probe that are measured: if it is plainly slower, usually, and while it is faster
without that being clear."""
_SETTLING_ROUNDS = {True: 3, False: 2}
"""Rounds after a change to speculation (the draft catches up) or to plain decoding (it finishes a
step) that say nothing of what follows."""
_CHANGE_COSTS = 0.5
"""Rounds lost by a change back and forth, besides: those drafts are not there."""
_CLEAR, _PLAINLY = 2.0, 3.0
"""Standard errors by which the other way must be ahead to be taken, and behind to be given up
early: a probe more costs less than a wrong change."""
_DRIFT = 1e-4
"""Variance that a round adds: the ratio may move by 10 % in some 100 rounds."""
_FORGETS = 1.0 - 1.0 / 1000
"""What is left of the logarithm after a round: a verdict from a bad moment must not last."""
_UNKNOWN = 1.0
"""Variance of a ratio of which nothing is known: it may be anything from 1/3 to 3."""
_EXPECTED = 0.04
"""The same of one that is derived from step times, or taken from the next level: 20 %."""
_MEMORY = 48
"""Rounds that the speed of the way in use is averaged over; half as many are its first trial."""
_FLOOR = 1e-4
"""Variance that no average gets below: rounds of one text are alike."""


class _Speed:
    """Discounted sums of rounds: gain per second, and its relative variance."""

    def __init__(self, noise: float) -> None:
        self._noise = noise
        """Relative variance of one round."""
        self._weight = self._squares = 0.0
        self._gained = self._seconds = 0.0

    def observe(self, gained: float, seconds: float) -> None:
        fade = 1.0 - 1.0 / _MEMORY
        if self._weight:
            expected = self.rate * seconds
            off = (gained - expected) / (expected or 1.0)
            self._noise += 0.02 * (min(off * off, 4.0) - self._noise)
        self._weight = self._weight * fade + 1.0
        self._squares = self._squares * fade * fade + 1.0
        self._gained = self._gained * fade + gained
        self._seconds = self._seconds * fade + seconds

    def again(self) -> _Speed:
        """Empty, with what is known of the noise."""
        return _Speed(self._noise)

    @property
    def rate(self) -> float:
        return self._gained / self._seconds if self._seconds else 0.0

    @property
    def round_seconds(self) -> float:
        return self._seconds / self._weight if self._weight else 0.0

    @property
    def variance(self) -> float:
        if not self._weight:
            return _UNKNOWN
        return self._noise * self._squares / self._weight**2 + _FLOOR


@dataclass(slots=True)
class _Probe:
    """The other way is being tried, or the usual one is coming back after that."""

    speed: _Speed
    rounds: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Belief:
    """The logarithm of the speed of speculation to that of plain decoding."""

    mean: float = 0.0
    variance: float = _UNKNOWN

    def after(self, seen: float, variance: float) -> Belief:
        """With one more measurement."""
        trust = self.variance / (self.variance + variance)
        return Belief(self.mean + trust * (seen - self.mean), (1.0 - trust) * self.variance)


@dataclass
class Switch:
    """Speculation on or off at one level of the batch size."""

    usually: bool = True
    """Whether to speculate, probes aside."""
    belief: Belief = field(default_factory=Belief)
    size: int = 1
    """The largest batch of the level: the more requests, the more alike are the rounds."""
    probes: int = 0
    """How many there were."""
    changes: int = 0
    """How often the usual way changed."""
    _probe: _Probe | None = None
    _settling: int = _SETTLING_ROUNDS[True]
    """Rounds to go until those of the usual way count."""
    _rounds: int = 0
    """Since the level was first seen."""

    def __post_init__(self) -> None:
        # Requests differ in how many tokens are accepted; plain rounds only in time.
        self._speeds = {True: _Speed(0.25 / self.size + 0.01), False: _Speed(0.01)}
        self._credit = Credit(_SHARE)
        self._clock = 0.0
        """Seconds of its rounds."""
        self._tried = False
        """Whether a probe has come to its end."""

    @property
    def on(self) -> bool:
        """Whether the next round speculates."""
        return self.usually != (self._probe is not None)

    def leave(self) -> None:
        """Another level's switch decides from now on; a probe under way is given up."""
        if self._probe is not None:
            self._end_probe(self._probe)

    def enter(self, on: bool) -> None:
        """This switch decides from now on; ``on`` says what the round before did."""
        self._settling = _SETTLING_ROUNDS[self.on] if on != self.on else 0

    def observe(self, gained: float, seconds: float, expected: float = 0.0) -> None:
        """Take in a round of the way that :attr:`on` said; decides on the next one.

        Args:
            gained: its tokens a request, weighed so that a batch of another size does not look
                faster.
            seconds: what it took.
            expected: what a second of plain decoding gains, as far as step times tell; 0: unknown.
        """
        self.belief.variance = min(self.belief.variance + _DRIFT, _UNKNOWN)
        self.belief.mean *= _FORGETS
        self._rounds += 1
        self._clock += seconds
        if self._probe is not None:
            self._take_probe(self._probe, gained, seconds)
            return
        usual = self._speeds[self.usually]
        if self._settling:
            self._settling -= 1
        else:
            usual.observe(gained, seconds)
        if self._rounds < _MEMORY // 2 or not usual.round_seconds:
            return
        if self.belief.variance > _EXPECTED and self.usually and expected:
            ratio = math.log(max(usual.rate, 1e-9) / expected)
            self.belief = self.belief.after(ratio, _EXPECTED + usual.variance)
        ready = self._credit.ready(self._clock, self._cost())
        if ready or (not self._tried and self._is_open):
            self._probe = _Probe(self._speeds[not self.usually].again())
            self.probes += 1

    @property
    def _is_open(self) -> bool:
        """Whether either way may be the faster one, as far as is known."""
        return abs(self.belief.mean) < _CLEAR * math.sqrt(self.belief.variance)

    def _loss(self) -> float:
        """What a second of the other way is believed to lose, as a share; negative if it gains."""
        ahead = self.belief.mean if self.usually else -self.belief.mean
        return 1.0 - math.exp(-ahead)

    def _cost(self) -> float:
        """Seconds that a probe is believed to cost."""
        loss, usual = self._loss(), self._speeds[self.usually]
        rounds = _SHORTEST_PROBE + sum(_SETTLING_ROUNDS.values())
        seconds = self._speeds[not self.usually].round_seconds or usual.round_seconds
        return max(0.0, loss * rounds * seconds + _CHANGE_COSTS * usual.round_seconds)

    def _take_probe(self, probe: _Probe, gained: float, seconds: float) -> None:
        probe.rounds += 1
        probe.seconds += seconds
        measured = probe.rounds - _SETTLING_ROUNDS[not self.usually]
        if measured <= 0:
            return
        probe.speed.observe(gained, seconds)
        usual = self._speeds[self.usually]
        ratio = math.log(max(probe.speed.rate, 1e-9) / max(usual.rate, 1e-9))
        variance = probe.speed.variance + usual.variance
        slower = ratio < -_PLAINLY * math.sqrt(variance)
        if measured < (_SHORTEST_PROBE if slower else _PROBE_ROUNDS):
            return
        belief = self.belief.after(-ratio if self.usually else ratio, variance)
        ahead = -belief.mean if self.usually else belief.mean
        error = math.sqrt(belief.variance)
        unclear = 0.0 < ahead < _CLEAR * error
        if unclear and measured < _LONGEST_PROBE:
            return
        self.belief, self._tried = belief, True
        self._end_probe(probe)
        if ahead > 0.0 and not unclear:
            self.usually = not self.usually
            self.changes += 1
            self._settling = 0

    def _end_probe(self, probe: _Probe) -> None:
        """Account for a probe; the usual way comes back."""
        lost = max(0.0, self._loss()) * probe.seconds
        lost += _CHANGE_COSTS * self._speeds[self.usually].round_seconds
        self._credit.spend(self._clock, lost)
        self._speeds[not self.usually] = probe.speed
        self._settling = _SETTLING_ROUNDS[self.usually]
        self._probe = None


class Switches:
    """The switches of all batch sizes, for greedy batches and for those with a temperature."""

    def __init__(self) -> None:
        self.by_level: dict[tuple[bool, int], Switch] = {}
        """By whether tokens are sampled, and the level of the batch size."""
        self._level = 0

    @property
    def size(self) -> int:
        """The largest batch of the level of the newest one."""
        return 1 << self._level

    def of(self, requests: int, sampled: bool) -> Switch:
        """The switch for a batch.

        Args:
            requests: its size. One just beyond the level of the batch before counts as that level:
                a change of ways at every request that comes or goes would cost more than it gains.
            sampled: whether most of them have a temperature.
        """
        most = 1 << self._level
        if not 0.4 * most < requests <= 1.25 * most:
            self._level = level_of(requests)
        key = sampled, self._level
        switch = self.by_level.get(key)
        if switch is None:
            switch = self.by_level[key] = self._new(sampled, self._level)
        return switch

    def _new(self, sampled: bool, level: int) -> Switch:
        """A level not seen before: what the next one knows is expected of it."""
        known = [
            (abs(at - level), at, switch)
            for (kind, at), switch in self.by_level.items()
            if kind == sampled and switch.belief.variance < 0.5 * _UNKNOWN
        ]
        if not known:
            return Switch(size=1 << level)
        distance, at, nearest = min(known, key=lambda near: near[:2])
        belief = Belief(nearest.belief.mean, nearest.belief.variance + _EXPECTED * distance)
        # The larger the batch, the less there is to gain.
        return Switch(nearest.usually or at > level, belief, 1 << level)
