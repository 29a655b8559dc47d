"""How fast the engine is: what its steps take, and the tokens per second that come of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vllm_ssd.core.step_times import Forecast, StepTimes

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

_SMOOTHING = 0.1
"""Weight of the newest step."""
_LONGEST = 4.0
"""A step that takes more than so many usual ones counts as that."""


class Step(NamedTuple):
    """A step in which every request decoded."""

    requests: int
    drafted: int
    """The drafted tokens that it verified, padding included."""


class Pace:
    """The measured speed of the target's steps."""

    def __init__(self) -> None:
        self.times = StepTimes()
        self.besides = 0.0
        """Seconds of a round besides its step: look-ups, waits."""
        self._tokens = self._seconds = 0.0
        self._step: Step | None = None
        self._forecast = Forecast(0.0, 0.0, 0.0)
        """The newest one."""

    @property
    def rate(self) -> float:
        """Tokens per second that the engine makes at the moment; 0.0 if that is not known."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def scheduled(self, step: SchedulerOutput) -> None:
        """A step begins. One with prefill tokens is not measured."""
        counts, drafts = step.num_scheduled_tokens, step.scheduled_spec_decode_tokens
        requests, drafted = len(counts), sum(map(len, drafts.values()))
        decodes = not step.scheduled_new_reqs and sum(counts.values()) == requests + drafted
        self._step = Step(requests, drafted) if decodes and requests else None

    def take_step(self) -> Step | None:
        """The step that has ended, if every request decoded in it; only once for each."""
        step, self._step = self._step, None
        return step

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in a step.

        Args:
            tokens: what it yielded, over all requests.
            seconds: from the proposal before it to the one after it, waiting included.
        """
        first = not self._seconds
        weight = 1.0 if first else _SMOOTHING
        if not first:
            seconds = min(seconds, _LONGEST * self._seconds)  # a pause is no step
        self._tokens += weight * (tokens - self._tokens)
        self._seconds += weight * (seconds - self._seconds)

    @property
    def seconds_per_token(self) -> float:
        """What verifying one more token takes now; 0.0 if that is not known."""
        return self._forecast.each

    def observe_step(self, step: Step, seconds: float, round_seconds: float) -> None:
        """Take in the times of a step while the draft was at work.

        Args:
            step: what it computed.
            seconds: from the proposal's end to the step's result.
            round_seconds: from the proposal's beginning.
        """
        self.times.observe(step.requests, step.drafted, seconds)
        besides = min(round_seconds - seconds, seconds)
        self.besides += _SMOOTHING * (besides - self.besides)

    def forecast(self, requests: int) -> Forecast:
        """What the next step takes by the drafted tokens it verifies; zeros if that is unknown."""
        self._forecast = self.times.forecast(requests)
        return self._forecast
