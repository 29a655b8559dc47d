"""Whether waiting for the draft pays: the tokens that it brings against the time that it takes.

While the engine makes R tokens a second, t seconds cost R t tokens. So waiting for more drafted
tokens pays if more of them will be accepted than that: ``gain / t > R``. The gain is the sum, over
the requests waited for, of the chances that their next tokens are accepted, less what verifying
these tokens costs. The first token of a wait takes longest (the draft must end the step under way,
and take in the outcome), so one more token may pay only if further ones follow: all numbers of
tokens are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

TRIALS = 5
"""So many waits are tried before the measured times decide: a single one may be an accident."""
_SMOOTHING = 0.2
"""Weight of the newest delay: the load changes within tens of rounds."""
_LATE = 2.0
"""A token that did not come in time is taken to need this many times as long, at a guess."""


class Awaited(NamedTuple):
    """A request that can use more tokens."""

    reached: float
    """The chance that all tokens it has so far are accepted."""
    missing: int
    """How many more it can use."""


def gains(awaited: Mapping[Awaited, int], acceptance: float, price: float) -> list[float]:
    """What 1, 2, ... more tokens for every request yield, in tokens, as far as any can use them.

    Args:
        awaited: the requests: of each kind how many there are. Most have nothing yet.
        acceptance: the chance that a token is accepted if those before it are.
        price: of verifying a token, in tokens; one whose chance is below that is not verified.
    """
    longest = max((request.missing for request in awaited), default=0)
    result: list[float] = []
    total, chance = 0.0, 1.0
    for more in range(1, longest + 1):
        chance *= acceptance
        for (reached, missing), count in awaited.items():
            if more <= missing:
                total += count * max(0.0, reached * chance - price)
        result.append(total)
    return result


def patience(gained: Sequence[float], rate: float, following: float) -> float:
    """For how many seconds the next token is worth waiting for; 0.0 if for none.

    Args:
        gained: what 1, 2, ... more tokens yield (:func:`gains`).
        rate: R, tokens per second; above 0.
        following: seconds from one of these tokens to the next.
    """
    return max(
        (gain / rate - more * following for more, gain in enumerate(gained)),
        default=0.0,
    )


class Delay:
    """How long a token takes to come, learned from those waited for."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._seen = self._missed = 0

    @property
    def seconds(self) -> float:
        """Smoothed; 0.0 while it is still to be tried."""
        return self._seconds if self._seen >= TRIALS else 0.0

    def came(self, seconds: float) -> None:
        """A token has come after so many seconds."""
        self._missed = 0
        self._observe(seconds, _SMOOTHING)

    def missed(self, seconds: float) -> None:
        """None came within so many seconds."""
        # A single one may have been an accident; several in a row are not.
        self._missed += 1
        self._observe(max(_LATE * seconds, self._seconds), min(1.0, _SMOOTHING * self._missed))

    def _observe(self, seconds: float, weight: float) -> None:
        weight = max(weight, 1.0 / (self._seen + 1))
        self._seconds += weight * (seconds - self._seconds)
        self._seen += 1
