"""How many guesses of the token after ``k`` accepted ones there may be, for each ``k``."""

from __future__ import annotations


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
    return apportion(weights, budget)


def apportion(weights: list[float], total: int) -> tuple[int, ...]:
    """``total`` split in proportion to ``weights``, by largest remainder."""
    scale = total / sum(weights)
    shares = [int(w * scale) for w in weights]
    by_remainder = sorted(range(len(weights)), key=lambda k: shares[k] - weights[k] * scale)
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return tuple(shares)
