"""Which outcomes get a fork: the likeliest, as many as pay.

The number of forks is bounded in total. A fan-out F_k bounds it for each k besides: that is how
arXiv 2603.03251 chooses them, and what the default is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arrays import Float64Array, Int64Array


class Forks(NamedTuple):
    """Outcomes worth a fork, likeliest first; arrays of one length m."""

    k: Int64Array
    """How many tokens are accepted."""
    choice: Int64Array
    """Which of the draft's choices after them t* is, from 1 on."""
    chance: Float64Array
    """That of this outcome."""

    def first(self, count: int) -> Forks:
        """The likeliest ``count``."""
        return Forks(self.k[:count], self.choice[:count], self.chance[:count])


def likeliest_forks(chances: Float64Array, most: int, caps: Sequence[int] | None = None) -> Forks:
    """The outcomes to guess beside the trunk's own (all n tokens and the first choice after them).

    Args:
        chances: ``[n + 1, C]``, of each outcome (:meth:`OutcomeModel.chances`); 0 where no fork is
            to be made.
        most: forks in all.
        caps: ``[n + 1]``, the most guesses after each k, the trunk's own among those of k = n; None
            for no such cap.
    """
    worth = chances[:, 1:]
    if caps is not None:
        own = np.arange(len(chances)) == len(chances) - 1
        guesses = np.maximum(np.asarray(caps) - own, 0)
        worth = np.where(np.cumsum(worth > 0.0, axis=1) <= guesses[:, None], worth, 0.0)
    flat = worth.ravel()
    order = np.argsort(-flat, kind="stable")[:most]
    order = order[flat[order] > 0.0]
    k, choice = np.divmod(order, worth.shape[1])
    return Forks(k, choice + 1, flat[order])


def best_count(forks: Forks, own: float, worth_of_a_hit: Float64Array) -> int:
    """How many of the likeliest forks to make: the number with most expected tokens.

    Args:
        forks: likeliest first.
        own: the chance of the trunk's own outcome.
        worth_of_a_hit: ``[branches]``, tokens that a hit yields with 1, 2, ... branches
            (:func:`vllm_ssd.core.budget.worth_of_a_hit`).
    """
    hit = own + np.append(0.0, np.cumsum(forks.chance))
    hit = hit[: len(worth_of_a_hit)]
    return int(np.argmax(hit * worth_of_a_hit[: len(hit)]))


def caps_for(fan_out: Sequence[int], verified: int) -> tuple[int, ...]:
    """The caps of a verification of ``verified`` tokens; K + 1 numbers are given for K tokens.

    When fewer than K are verified, the guesses of the outcomes that cannot happen are given to
    those that can: after a prompt (``verified = 0``) all of them to ``k = 0``.
    """
    possible = tuple(fan_out[: verified + 1])
    if sum(possible) == 0:
        possible = (1,) * (verified + 1)
    return apportion([float(f) for f in possible], sum(fan_out))


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
