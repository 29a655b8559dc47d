"""How verifications end: how many drafted tokens are accepted, which token follows them.

An outcome is ``(k, t*)``: ``k`` of the ``n`` verified tokens were accepted and the target
emitted ``t*`` after them. Before anything was observed two numbers say how likely each one is:

* ``acceptance`` a: the chance that one drafted token is accepted, so that
  ``P(k) = a^k (1 - a)`` for ``k < n`` and ``a^n`` for ``k = n``;
* ``miss_exponent`` r: after F guesses of ``t*`` the chance that none was right is
  ``(F + 1)^-r`` (arXiv 2603.03251, Def. 11, shifted by one so that no guess means no hit).

What is observed then counts more and more: drafts and texts differ in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_ssd.core.fanout import apportion

PRIOR = 20.0
"""How many observations the two numbers given are worth."""
MEMORY = 1000
"""Observations after which one counts for a third."""


class Guess(NamedTuple):
    """One outcome worth a branch."""

    accepted: int
    """k, how many of the verified tokens are accepted."""
    rank: int
    """Which of the draft's candidates for ``t*``: 0 is its first choice."""
    probability: float
    """How likely this outcome is."""


class OutcomeModel:
    """Learns how likely the outcomes are.

    Args:
        acceptance: a, to begin with.
        miss_exponent: r, to begin with.
        ranks: how many candidates for ``t*`` there are at most.
    """

    def __init__(self, acceptance: float, miss_exponent: float, ranks: int) -> None:
        missed = np.arange(1.0, ranks + 2.0) ** -miss_exponent
        by_rank = PRIOR * np.append(missed[:-1] - missed[1:], missed[-1])
        self._tried, self._accepted = PRIOR, PRIOR * acceptance
        # The last entry of each is for tokens that are no candidates.
        self._after_rejection, self._after_all = by_rank, by_rank.copy()
        self._decay = 1.0 - 1.0 / MEMORY

    @property
    def acceptance(self) -> float:
        """The chance that one drafted token is accepted."""
        return self._accepted / self._tried

    def observe(self, verified: int, accepted: int, rank: int | None) -> None:
        """Take in one outcome.

        Args:
            verified: n.
            accepted: k.
            rank: of ``t*`` among the candidates; one that is too high if it is none of them, and
                None if they are not known.
        """
        rejected = accepted < verified
        if verified:
            self._tried = self._tried * self._decay + accepted + rejected
            self._accepted = self._accepted * self._decay + accepted
        if rank is not None:
            counts = self._after_rejection if rejected else self._after_all
            counts *= self._decay
            counts[min(rank, len(counts) - 1)] += 1.0

    def likeliest(self, verified: int, fan_out: Sequence[int]) -> list[Guess]:
        """The outcomes to guess when ``verified`` tokens are being verified, likeliest first.

        ``fan_out[k]`` bounds the guesses after ``k`` accepted tokens. When fewer than
        ``len(fan_out) - 1`` tokens are verified, the guesses of the outcomes that cannot happen are
        given to those that can: after a prompt (``verified = 0``) the whole budget goes to
        ``k = 0``.
        """
        possible = fan_out[: verified + 1]
        if sum(possible) == 0:
            possible = (1,) * (verified + 1)
        caps = apportion([float(f) for f in possible], sum(fan_out))
        a = self.acceptance
        after_rejection, after_all = _chances(self._after_rejection), _chances(self._after_all)
        guesses = []
        for k, cap in enumerate(caps):
            if k == verified:
                p_k, by_rank = a**k, after_all
            else:
                p_k, by_rank = a**k * (1.0 - a), after_rejection
            guesses += [Guess(k, rank, p_k * p) for rank, p in enumerate(by_rank[:cap])]
        guesses.sort(key=lambda guess: -guess.probability)
        return guesses


def _chances(counts: NDArray[np.float64]) -> list[float]:
    """Of each rank. That a worse candidate came true more often than a better one is noise."""
    chances: list[float] = (np.sort(counts[:-1])[::-1] / counts.sum()).tolist()
    return chances
