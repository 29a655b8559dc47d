"""A budget of time for trying out what does not seem to pay."""

from __future__ import annotations


class Credit:
    """Allows trials that together cost at most a share of the time.

    What was not used for long is not saved: there are no bursts of trials.

    Args:
        share: of the time.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._since = 0.0
        """Up to then all trials are paid for."""

    def ready(self, now: float, cost: float = 0.0) -> bool:
        """Whether a trial may begin that is expected to cost so many seconds."""
        return self._share * (now - self._since) >= cost

    def spend(self, now: float, cost: float) -> None:
        """A trial has cost so many seconds."""
        self._since = max(now, self._since + cost / self._share)
