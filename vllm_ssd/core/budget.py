"""How many branches pay in a round, given the measured times of steps and verifications."""

from __future__ import annotations

import numpy as np

from vllm_ssd.core.arrays import Float64Array
from vllm_ssd.core.step_times import Line

_SMOOTHING = 0.2
"""Weight of the newest verification time."""


class StepTimeModel:
    """Seconds of one draft step as a straight line over its rows, fitted while it runs."""

    def __init__(self) -> None:
        self._line = Line()

    def observe(self, rows: int, seconds: float) -> None:
        """Take in one measured step."""
        self._line.observe(rows, seconds)

    def predict(self, rows: Float64Array) -> Float64Array:
        """Seconds of a step with each number of rows; 0.0 before anything was observed."""
        line = self._line
        return np.maximum(line.mean + line.slope() * (rows - line.tokens), 0.1 * line.mean)


def worth_of_a_hit(
    most: int,
    clock: StepTimeModel,
    seconds: float,
    requests: int,
    depth: int,
    acceptance: float,
    prepared: bool,
    lookahead: bool = False,
    others: float = 0.0,
    price: float = 0.0,
) -> Float64Array:
    """How many more tokens a round yields on a hit, with 1, 2, ... branches for every request.

    More branches catch more outcomes but make every step slower and so the branches shallower
    when the verification ends after ``seconds``. The best number maximises the expected tokens of
    the next round, ``1 + p_hit worth``. A branch of d tokens is worth
    ``a + a^2 + ... + a^d`` (arXiv 2603.03251: the verification of d drafted tokens yields
    ``(1 - a^(d+1)) / (1 - a)``, without them 1), less what verifying them costs
    (:func:`_gains`).

    A verification begins and ends somewhere within a step of the draft: of x steps that would fit,
    x - 1 are completed on average. With look-ahead the step launched behind the one under way has
    to end first as well: x - 2. Unless ``prepared``, one step with the trunks alone must first
    find the candidates for the guesses.

    Args:
        most: branches per request.
        clock: the measured time of a step.
        seconds: of the verification; 0.0 if that is not known.
        requests: how many are drafted for.
        depth: K.
        acceptance: a.
        prepared: whether the candidates are known already.
        lookahead: whether the draft launches a step while another one is under way.
        others: rows that its steps decode for other targets.
        price: of verifying one more token, in tokens.

    Returns:
        ``[most]``; all 1 while the times are not known, so that more branches are better.
    """
    steps = clock.predict(others + requests * np.arange(1.0, most + 1.0, dtype=np.float64))
    if not steps[0] or seconds <= 0.0:
        return np.ones(most)
    if not prepared:
        seconds -= float(steps[0])
    # Fractional: what is reached in some rounds and not in others.
    reached = np.clip(seconds / steps - 1.0 - lookahead, 0.0, depth)
    chances: Float64Array = acceptance ** np.arange(1.0, depth + 1.0, dtype=np.float64)
    worth = np.append(0.0, np.cumsum(_gains(chances, price)))
    return np.interp(reached, np.arange(depth + 1.0), worth)


def _gains(chances: Float64Array, price: float) -> Float64Array:
    """What tokens bring beyond their price, if only those are verified whose chance is above it.

    Chances differ from branch to branch; here they are spread evenly from 0 to twice their mean.

    Args:
        chances: the mean chances that tokens, with all before them, are accepted.
        price: of verifying a token, in tokens.
    """
    most = 2.0 * chances
    verified = np.where(most > price, 1.0 - price / np.maximum(most, 1e-300), 0.0)
    gains: Float64Array = chances * verified**2
    return gains


class RoundTimes:
    """How long steps and verifications take now, as far as measured.

    Args:
        depth: K.
        lookahead: whether the draft launches a step while another one is under way.
        steps: the measured time of a step.
    """

    def __init__(self, depth: int, lookahead: bool, steps: StepTimeModel) -> None:
        self._others = 0.0
        """Rows that a step decodes for other targets, smoothed."""
        self._steps = steps
        self._depth, self._lookahead = depth, lookahead
        self._batch = 1
        """Requests that are drafted for."""
        self._verifying = False
        """Whether any drafted token is being verified."""
        self._verify_seconds = {False: 0.0, True: 0.0}
        """How long a verification takes, smoothed; without drafts it is a good deal shorter."""
        self._plan_seconds = 0.0
        """From an outcome until the next step can be launched, smoothed."""
        self._price = 0.0
        """Of verifying one more token, in tokens."""
        self._worth: Float64Array | None = None
        """The result of :meth:`worth_of_a_hit` in this round."""

    def begin_round(self, batch: int, verifying: bool, verify_seconds: float, price: float) -> None:
        """A verification has ended and the next one has begun.

        Args:
            batch: requests in it.
            verifying: whether drafted tokens are verified now.
            verify_seconds: how long the last one took; 0.0 if that is not known.
            price: of verifying one more token, in tokens; 0.0 if that is not known.
        """
        if verify_seconds:
            before = self._verify_seconds[self._verifying] or verify_seconds
            self._verify_seconds[self._verifying] = before + _SMOOTHING * (verify_seconds - before)
        self._batch, self._verifying, self._price = batch, verifying, price
        self._worth = None

    def observe_others(self, rows: int) -> None:
        """Take in how many rows a step decoded for other targets."""
        self._others += _SMOOTHING * (rows - self._others)

    def observe_plan(self, seconds: float) -> None:
        """Take in what it took to follow outcomes and to plan and fork the next trees."""
        self._plan_seconds += _SMOOTHING * (seconds - self._plan_seconds)

    def worth_of_a_hit(self, most: int, acceptance: float) -> Float64Array:
        """``[2, most]``: without and with the choices known already (:func:`worth_of_a_hit`)."""
        if self._worth is None:
            seconds = self._verify_seconds[self._verifying]
            seconds = seconds or self._verify_seconds[not self._verifying]
            if seconds:
                seconds = max(1e-9, seconds - self._plan_seconds)
            shared = (most, self._steps, seconds, self._batch, self._depth, acceptance)
            more = self._lookahead, self._others, self._price
            self._worth = np.stack(
                [worth_of_a_hit(*shared, prepared, *more) for prepared in (False, True)]
            )
        return self._worth
