"""Which verification outcomes are guessed, and in which order.

An outcome is ``(k, t*)``: ``k`` of the ``n`` verified tokens were accepted and the target
emitted ``t*`` after them. How often each one happens is modelled by two numbers:

* ``acceptance`` a: the chance that one drafted token is accepted, so that
  ``P(k) = a^k (1 - a)`` for ``k < n`` and ``a^n`` for ``k = n``;
* ``miss_exponent`` r: after F guesses of ``t*`` the chance that none was right is
  ``(F + 1)^-r`` (arXiv 2603.03251, Def. 11, shifted by one so that no guess means no hit).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Guess(NamedTuple):
    """One outcome worth a branch."""

    accepted: int
    """k, how many of the verified tokens are accepted."""
    rank: int
    """Which of the draft's candidates for ``t*``: 0 is its first choice."""
    probability: float
    """How likely this outcome is, by the model above."""


def uniform_fan_out(num_speculative_tokens: int, fan_out: int) -> tuple[int, ...]:
    """The same number of guesses after every ``k``; length ``num_speculative_tokens + 1``."""
    return (fan_out,) * (num_speculative_tokens + 1)


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
    return _apportion(weights, budget)


def _apportion(weights: list[float], total: int) -> tuple[int, ...]:
    """``total`` split in proportion to ``weights``, by largest remainder."""
    scale = total / sum(weights)
    shares = [int(w * scale) for w in weights]
    by_remainder = sorted(range(len(weights)), key=lambda k: shares[k] - weights[k] * scale)
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return tuple(shares)


@lru_cache(maxsize=4096)
def likeliest_guesses(
    verified: int, fan_out: tuple[int, ...], acceptance: float, miss_exponent: float
) -> tuple[Guess, ...]:
    """The outcomes to guess when ``verified`` tokens are being verified, likeliest first.

    ``fan_out[k]`` bounds the guesses after ``k`` accepted tokens. When fewer than
    ``len(fan_out) - 1`` tokens are verified, the guesses of the outcomes that cannot happen are
    given to those that can: after a prompt (``verified = 0``) the whole budget goes to ``k = 0``.
    """
    total = sum(fan_out)
    possible = fan_out[: verified + 1]
    if sum(possible) == 0:
        possible = (1,) * (verified + 1)
    caps = _apportion([float(f) for f in possible], total)
    guesses = []
    for k, cap in enumerate(caps):
        p_k = acceptance**k * (1.0 if k == verified else 1.0 - acceptance)
        for rank in range(cap):
            p_rank = (rank + 1.0) ** -miss_exponent - (rank + 2.0) ** -miss_exponent
            guesses.append(Guess(k, rank, p_k * p_rank))
    guesses.sort(key=lambda guess: -guess.probability)
    return tuple(guesses)
