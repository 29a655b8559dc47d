"""How tokens are drafted above temperature 0: the ways there are, and which one is the best.

A way is an :class:`Arm`: first choices, or samples with some C (arXiv 2603.03251, Definition 14).
Which yields more tokens per second depends on the pair of models, the temperature and the load. A
request keeps an arm for a block of verifications; then :class:`BestArm` draws the next one by
Thompson sampling: each arm's mean is drawn from a normal distribution around the measured one, as
wide as it is uncertain, and the largest wins. So an arm is tried as often as it may still be the
best one: seldom if it is much worse, often if it is nearly as good, when trying it costs nothing.
Older blocks fade, so that arms are tried again, now and then, and a change is followed.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

WEIGHTS = (1.0, 0.6, 0.3, 0.0)
"""The values of C that are tried with ``saguaro_c`` ``"auto"``."""
_LEVEL_ENDS = (0.5, 0.85, 1.2)
"""Temperatures at which one level ends and the next begins."""
LEVELS = len(_LEVEL_ENDS) + 1
BLOCK = 32
"""Verifications for which a request keeps its arm."""
_SKIPPED = 2
"""After a change of arms the first verifications are not counted: they are of tokens drafted
before."""
_MEMORY = 200.0
"""Number of blocks of a level after which the weight of an older one has fallen to 1 / e."""
_SPREAD = 0.2
"""The standard deviation of a block's rate, in parts of the mean, until it is known."""
_SPREAD_WEIGHT = 10.0
"""The number of blocks that this counts for."""
_IN_TURN = 3.0
"""Blocks that each arm gets at first, in turn."""


class Arm(NamedTuple):
    """A way to draft."""

    sampled: bool
    """Whether tokens are sampled; if not, they are first choices."""
    weight: float
    """C."""

    @property
    def name(self) -> str:
        """For counters."""
        return f"c_{self.weight:g}" if self.sampled else "greedy"


_GREEDY = Arm(False, 1.0)


def arms_of(draft_sampling: str, saguaro_c: float) -> tuple[Arm, ...]:
    """The arms that the options allow.

    Args:
        draft_sampling: ``"greedy"``, ``"probabilistic"`` or ``"auto"``.
        saguaro_c: C; negative: one of :data:`WEIGHTS`, learned.
    """
    if draft_sampling == "greedy":
        return (_GREEDY,)
    weights = WEIGHTS if saguaro_c < 0.0 else (saguaro_c,)
    sampled = tuple(Arm(True, weight) for weight in weights)
    return sampled if draft_sampling == "probabilistic" else (_GREEDY, *sampled)


def level_of(temperature: float) -> int:
    """Which level a temperature above 0 belongs to, from 0 on: each learns for itself."""
    return bisect.bisect_left(_LEVEL_ENDS, temperature)


class Settings:
    """A request's setting says what is learned together: the level of its temperature, its arm.

    Setting 0 is that of all greedy requests.

    Args:
        arms: the arms that there are.
    """

    def __init__(self, arms: Sequence[Arm]) -> None:
        self.arms = tuple(arms)
        self.count = 1 + LEVELS * len(self.arms)

    def of(self, level: int, arm: int) -> int:
        """The setting of requests of a level that are drafted for with an arm."""
        return 1 + level * len(self.arms) + arm


class Block:
    """The verifications of a request with one arm.

    Args:
        arm: which one.
        skipped: how many of them do not count.
    """

    __slots__ = (
        "_skipped",
        "arm",
        "counted",
        "drafted",
        "gained",
        "rounds",
        "seconds",
        "tokens",
        "verifications",
    )

    def __init__(self, arm: int, skipped: int = 0) -> None:
        self.arm = arm
        self._skipped = skipped
        self.verifications = 0
        """All of them."""
        self.counted = 0
        """Those that count."""
        self.tokens = 0
        """What these have yielded, ..."""
        self.gained = 0.0
        """... less what it cost to verify their drafted tokens, ..."""
        self.seconds = 0.0
        """... how long they took, ..."""
        self.rounds = 0.0
        """... and that in verifications that take the usual time."""
        self.drafted = 0
        """Drafted tokens among what they verified."""

    @property
    def full(self) -> bool:
        """Whether the request may change its arm."""
        return self.verifications >= BLOCK

    def next(self, arm: int) -> Block:
        """The block after this one."""
        return Block(arm, _SKIPPED if arm != self.arm else 0)

    def observe(
        self, tokens: int, drafted: int, seconds: float, price: float = 0.0, usual: float = 1.0
    ) -> None:
        """Take in a verification.

        Args:
            tokens: what it yielded.
            drafted: how many drafted tokens it was of.
            seconds: how long it took; 0.0 if that is not known: then it does not count. Requests
                verified together take it together, however many tokens are of each.
            price: of verifying a drafted token, in tokens that the others do not get meanwhile.
            usual: how long one of as many requests usually takes: a larger batch takes longer, and
                that says nothing about an arm.
        """
        self.verifications += 1
        if self.verifications > self._skipped and seconds:
            self.counted += 1
            self.tokens += tokens
            self.gained += tokens - price * drafted
            self.drafted += drafted
            self.seconds += seconds
            self.rounds += seconds / usual


class BestArm:
    """Learns which arm yields most tokens per usual time, less what they cost, at one level.

    Args:
        arms: how many there are.
        seed: of its random numbers.
    """

    def __init__(self, arms: int, seed: int | str) -> None:
        self._random = random.Random(seed)
        self._weight = [0.0] * arms
        """Blocks observed with each arm; older ones have faded."""
        self._rate = [0.0] * arms
        """The mean of what they gained per verification of the usual time."""
        self._turn = 0
        self._in_turn = arms > 1
        """Until each arm has had its first blocks."""
        self._spread = _SPREAD_WEIGHT
        self._variance = _SPREAD_WEIGHT * _SPREAD**2
        """Of the rates of blocks around their arm's mean, in parts of it, squared and summed."""

    def observe(self, block: Block) -> None:
        """Take in a block; one without drafted tokens says nothing."""
        if not block.drafted:
            return
        share = block.counted / BLOCK
        # A rate stays above 0, whatever the price.
        rate, arm = max(block.gained, 0.1 * block.tokens) / block.rounds, block.arm
        fades = math.exp(-share / _MEMORY)
        self._weight = [weight * fades for weight in self._weight]
        before = self._weight[arm]
        if before > 0.0:
            # The mean itself is uncertain by 1 / before, a short block by 1 / share.
            apart = (rate / self._rate[arm] - 1.0) ** 2 * share / (1.0 + share / before)
            self._spread = self._spread * fades + share
            self._variance = self._variance * fades + apart
        self._weight[arm] = before + share
        self._rate[arm] += (rate - self._rate[arm]) * share / self._weight[arm]

    def choose(self) -> int:
        """The arm of the next block."""
        if len(self._weight) == 1:
            return 0
        self._in_turn = self._in_turn and min(self._weight) < _IN_TURN
        if self._in_turn:
            self._turn += 1
            return self._turn % len(self._weight)
        spread = math.sqrt(self._variance / self._spread)
        drawn = [
            rate * (1.0 + spread / math.sqrt(max(weight, 1.0)) * self._random.gauss(0.0, 1.0))
            for rate, weight in zip(self._rate, self._weight, strict=True)
        ]
        return drawn.index(max(drawn))
