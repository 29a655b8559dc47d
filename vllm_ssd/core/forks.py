"""Which outcomes get a fork: the likeliest, as many as pay.

The number of forks is bounded in total. A fan-out F_k also bounds it for each k, as in
arXiv 2603.03251; the default is compared with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arrays import BoolArray, Float64Array, Int64Array


class Forks(NamedTuple):
    """Outcomes that get a fork, ``[m]`` all: by request, the likeliest of each first."""

    request: Int64Array
    """Which of the B requests."""
    k: Int64Array
    """How many tokens are accepted."""
    choice: Int64Array
    """Which of the draft's choices after them t* is."""
    chance: Float64Array
    """The chance of this outcome."""

    def where(self, kept: BoolArray | Int64Array) -> Forks:
        """Some of them."""
        return Forks(self.request[kept], self.k[kept], self.choice[kept], self.chance[kept])


def choose_forks(
    chances: Float64Array,
    most: Int64Array,
    worth_of_a_hit: Float64Array | None = None,
    caps: Int64Array | None = None,
    own: Float64Array | None = None,
) -> Forks:
    """The likeliest outcomes beside the trunk's own (all n tokens and the one it holds after them).

    Their number maximises the expected tokens of the next round, ``p_hit * worth_of_a_hit``, where
    p_hit is the chance of the outcomes guessed, the trunk's own included.

    Args:
        chances: ``[B, K + 1, C]``, of each outcome (:meth:`OutcomeModel.chances`); 0 where no fork
            is to be made.
        most: ``[B]``, forks of each request.
        worth_of_a_hit: ``[B, branches]``, tokens that a hit yields with 1, 2, ... branches
            (:func:`vllm_ssd.core.budget.worth_of_a_hit`); None for as many forks as there may be.
        caps: ``[B, K + 1]``, the most forks for each k; None for no such cap.
        own: ``[B]``, the chance of the trunk's own outcome, for which ``chances`` is 0. None: that
            is always choice 0, which gets no fork.
    """
    of_forks = chances
    if own is None:
        own = chances[..., 0].sum(axis=1)
        of_forks = chances.copy()
        of_forks[..., 0] = 0.0
    if caps is not None:
        of_forks = np.where(np.cumsum(of_forks > 0.0, axis=2) <= caps[..., None], of_forks, 0.0)
    flat = of_forks.reshape(len(chances), -1)
    order = np.argsort(-flat, axis=1, kind="stable")[:, : int(most.max(initial=0))]
    chance = np.take_along_axis(flat, order, axis=1)
    count = most
    if worth_of_a_hit is not None:
        hit = np.empty((len(chances), order.shape[1] + 1))
        hit[:, 0] = own
        np.cumsum(chance, axis=1, out=hit[:, 1:])
        hit[:, 1:] += hit[:, :1]
        width = min(hit.shape[1], worth_of_a_hit.shape[1])
        best = np.argmax(hit[:, :width] * worth_of_a_hit[:, :width], axis=1)
        count = np.minimum(most, best)
    request, rank = np.nonzero((np.arange(order.shape[1]) < count[:, None]) & (chance > 0.0))
    k, choice = np.divmod(order[request, rank], of_forks.shape[2])
    return Forks(request, k, choice, chance[request, rank])


def caps_for(fan_out: Sequence[int], verified: int) -> tuple[int, ...]:
    """The caps of a verification of ``verified`` tokens; K + 1 numbers are given for K tokens.

    When fewer than K are verified, the guesses for outcomes that cannot happen go to those that
    can: after a prompt (``verified = 0``) all of them to ``k = 0``.
    """
    possible = tuple(fan_out[: verified + 1])
    if sum(possible) == 0:
        possible = (1,) * (verified + 1)
    return apportion([float(f) for f in possible], sum(fan_out))


def fork_caps(fan_out: Sequence[int], verified: Int64Array) -> Int64Array:
    """How many forks B verifications may have for each k, ``[B, K + 1]`` (:func:`caps_for`).

    Args:
        fan_out: ``[K + 1]``.
        verified: ``[B]``, n of each. The trunk itself is the first guess after all n tokens.
    """
    caps = np.zeros((len(verified), len(fan_out)), np.int64)
    for row, n in zip(caps, verified.tolist(), strict=True):
        row[: n + 1] = caps_for(fan_out, n)
        row[n] = max(0, row[n] - 1)
    return caps


def geometric_fan_out(
    num_speculative_tokens: int, fan_out: int, acceptance: float, miss_exponent: float
) -> tuple[int, ...]:
    """The best split of ``fan_out * (num_speculative_tokens + 1)`` guesses (Thm. 12).

    ``F_k = F_0 a^(k/(1+r))`` for ``k < K`` and ``F_K = F_0 a^(K/(1+r)) (1-a)^(-1/(1+r))``, rounded
    so that the sum is kept.
    """
    last = num_speculative_tokens
    exponent = 1.0 / (1.0 + miss_exponent)
    weights = [acceptance ** (k * exponent) for k in range(last + 1)]
    weights[last] *= (1.0 - acceptance) ** -exponent
    budget = fan_out * (last + 1)
    return apportion(weights, budget)


def apportion(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """``total`` split in proportion to ``weights``, by largest remainder."""
    scale = total / sum(weights)
    shares = [int(w * scale) for w in weights]
    by_remainder = sorted(range(len(weights)), key=lambda k: shares[k] - weights[k] * scale)
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return tuple(shares)
