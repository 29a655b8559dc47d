"""How fast the engine is: what its steps take, and the tokens per second that come of it."""

from __future__ import annotations

_SMOOTHING = 0.1
"""Weight of the newest step."""


class Pace:
    """The measured speed of the target's steps."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second that the engine makes at the moment; 0.0 if that is not known."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in a step.

        Args:
            tokens: what it yielded, over all requests.
            seconds: from the proposal before it to the one after it, waiting included.
        """
        first = not self._seconds
        weight = 1.0 if first else _SMOOTHING
        self._tokens += weight * (tokens - self._tokens)
        self._seconds += weight * (seconds - self._seconds)
