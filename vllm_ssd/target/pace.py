"""How fast the engine is: what its steps take, and the tokens per second that come of it."""

from __future__ import annotations

import numpy as np

from vllm_ssd.core.budget import StepTimeModel

_SMOOTHING = 0.1
"""Weight of the newest step."""


class Pace:
    """The measured speed of the target's steps."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._verifying = StepTimeModel()

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

    @property
    def seconds_per_token(self) -> float:
        """What verifying one more token takes; 0.0 if that is not known."""
        without, with_it = self._verifying.predict(np.array([8.0, 9.0]))
        return float(with_it - without)

    def observe_verification(self, tokens: int, seconds: float) -> None:
        """Take in how long the target took.

        Args:
            tokens: verified in this step: one for each request and its drafted ones.
            seconds: from the proposal to the outcome.
        """
        self._verifying.observe(tokens, seconds)
