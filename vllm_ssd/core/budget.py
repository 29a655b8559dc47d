"""How many branches a round can afford: what the draft's measured speed lets become useful."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_ssd.core.outcomes import Guess


class StepTimeModel:
    """Seconds of one draft step as a straight line over its rows, fitted while it runs.

    Exponentially weighted least squares over the observed ``(rows, seconds)`` pairs: recent steps
    count most, so that a changed load is followed within ``memory`` steps.
    """

    def __init__(self, memory: int = 100) -> None:
        self._decay = 1.0 - 1.0 / memory
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Take in one measured step."""
        decay = self._decay
        self._n = self._n * decay + 1.0
        self._x = self._x * decay + rows
        self._y = self._y * decay + seconds
        self._xx = self._xx * decay + rows * rows
        self._xy = self._xy * decay + rows * seconds

    def predict(self, rows: int) -> float:
        """Seconds of a step with ``rows`` rows; 0.0 before anything was observed."""
        if self._n == 0.0:
            return 0.0
        mean_x, mean_y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean_x * mean_x
        if variance < 1e-6:
            return mean_y
        # More rows never make a step cheaper; a negative slope is noise.
        slope = max(0.0, (self._xy / self._n - mean_x * mean_y) / variance)
        return max(mean_y + slope * (rows - mean_x), 0.1 * mean_y)


def expected_tokens(depth: int, acceptance: float) -> float:
    """Tokens a verification of ``depth`` drafted ones yields: ``(1 - a^(d+1)) / (1 - a)``."""
    if acceptance >= 1.0:
        return depth + 1.0
    return (1.0 - acceptance ** (depth + 1)) / (1.0 - acceptance)


def affordable_guesses(
    guesses: Sequence[Guess],
    clock: StepTimeModel,
    seconds: float,
    requests: int,
    depth: int,
    acceptance: float,
    prepared: bool,
) -> int:
    """How many of ``guesses``, the first ones, to draft for each of ``requests`` requests.

    More branches catch more outcomes but make every step slower and so the branches shallower
    when the verification ends after ``seconds``. The number chosen maximises the expected tokens
    of the next round, ``p_hit E(depth reached) + (1 - p_hit)``; at least 1.

    A verification begins and ends somewhere in a step of the draft: of x steps that would fit,
    x - 1 are completed on average. Unless ``prepared``, the candidates for the guesses come out of
    a step of their own, with the trunks alone.
    """
    if clock.predict(1) == 0.0 or seconds <= 0.0:
        return len(guesses)
    if not prepared:
        seconds -= clock.predict(requests)
    best, best_value, hit = 1, 1.0, 0.0
    for count, guess in enumerate(guesses, start=1):
        hit += guess.probability
        # Fractional: what is reached in some rounds and not in others.
        steps = seconds / clock.predict(count * requests) - 1.0
        reached = min(float(depth), max(0.0, steps))
        whole = int(reached)
        here = expected_tokens(whole, acceptance)
        deeper = expected_tokens(whole + 1, acceptance)
        value = 1.0 + hit * (here + (reached - whole) * (deeper - here) - 1.0)
        if value > best_value:
            best, best_value = count, value
    return best
