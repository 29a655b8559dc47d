"""How fast the engine is: what its steps take, and the tokens per second that come of it."""

from __future__ import annotations

from vllm_ssd.core.step_times import Forecast, StepTimes
from vllm_ssd.target.steps import Decodes

_SMOOTHING = 0.1
"""Weight of the newest round: requests differ more than the load does within ten rounds."""
_LONGEST = 4.0
"""A round that takes more than so many usual ones was a pause, and counts as that."""


class Pace:
    """The measured speed of the target's steps, and what time costs: tokens not made meanwhile."""

    def __init__(self) -> None:
        self.times = StepTimes()
        self.clock = 0.0
        """Seconds of all rounds taken in."""
        self.requests = 0
        """Requests of the steps to come ..."""
        self.forecast = Forecast(0.0, 0.0, 0.0)
        """... and what such a step takes; zeros if that is not known."""
        self._tokens = self._seconds = 0.0
        self._step: Decodes | None = None

    @property
    def rate(self) -> float:
        """Tokens per second that the engine makes at the moment; 0.0 if that is not known."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def price(self) -> float:
        """What verifying one more drafted token costs, in tokens; 0.0 if that is not known."""
        return max(0.0, self.rate * self.forecast.each)

    @property
    def once(self) -> float:
        """What verifying any drafted token costs besides, in tokens."""
        return self.rate * (self.forecast.base - self.forecast.plain)

    @property
    def round_seconds(self) -> float:
        """What a round takes, waits included; 0.0 if that is not known."""
        return self._seconds

    def scheduled(self, step: Decodes | None) -> None:
        """A step begins. One with prefill tokens (None) is not measured."""
        self._step = step

    def take_step(self) -> Decodes | None:
        """The step that has ended, if every request decoded in it; only once for each."""
        step, self._step = self._step, None
        return step

    def observe(self, tokens: int, seconds: float) -> float:
        """Take in a round.

        Args:
            tokens: what it yielded, over all requests.
            seconds: from the proposal before it to the one after it, waiting included.

        Returns:
            The seconds that count: fewer, if there was a pause.
        """
        first = not self._seconds
        weight = 1.0 if first else _SMOOTHING
        if not first:
            seconds = min(seconds, _LONGEST * self._seconds)
        self.clock += seconds
        self._tokens += weight * (tokens - self._tokens)
        self._seconds += weight * (seconds - self._seconds)
        return seconds

    def expect(self, requests: int) -> None:
        """The steps to come have so many requests."""
        if requests != self.requests:
            self._carry_over(requests)
        self.requests, self.forecast = requests, self.times.forecast(requests)

    def _carry_over(self, requests: int) -> None:
        """What rounds yield and take with another number of requests, until some are measured."""
        before = self.times.usual(self.requests)
        if self.requests and before:
            self._tokens *= requests / self.requests
            self._seconds *= self.times.usual(requests) / before
