"""How verifications end: how many drafted tokens are accepted, which token follows them.

An outcome is ``(k, t*)``: ``k`` of the ``n`` verified tokens were accepted and the target
emitted ``t*`` after them. One question decides it at every position: is the draft's first choice
right? The target accepts it as often as it would emit it. Where it is wrong for the first time k
ends, and ``t*`` is one of the draft's other choices there. If all n are right, ``t*`` is the first
choice after them or, again, another one.

What is learned from the verifications seen:

* how often a first choice is right, by the draft's confidence in it. Most tokens of a text are
  certain and a few are not; where they stand says more than how many there are;
* which of the other choices it is, if it is not the first.

Before anything was observed two numbers stand for that: ``acceptance`` a, the chance that a first
choice is right, whatever the confidence; and ``miss_exponent`` r: of F other choices none is right
with chance ``(F + 1)^-r`` (arXiv 2603.03251, Def. 11, shifted by one so that no guess means no
hit).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_ssd.core.arrays import Float32Array, Float64Array
from vllm_ssd.core.forks import apportion

BINS = 8
"""Levels of confidence that are told apart."""
PRIOR = 10.0
"""How many observations the two numbers given are worth, at each level."""
MEMORY = 1000
"""Observations after which one counts for a third."""
_DECAY = 1.0 - 1.0 / MEMORY



class Forecast(NamedTuple):
    """The outcomes worth a fork, likeliest first; of one k the draft's better choices first."""

    accepted: NDArray[np.int64]
    """``[m]``, k of each."""
    hit: Float64Array
    """``[m + 1]``, the chance that the outcome is among the first i of them or the trunk's own:
    all tokens and the first choice after them."""


class OutcomeModel:
    """Learns how likely the outcomes are.

    Args:
        acceptance: a, to begin with.
        miss_exponent: r, to begin with.
        ranks: how many choices beside the first there are at most.
        fan_out: ``[K + 1]``, how many guesses there may be after each k, the trunk's included.
    """

    def __init__(
        self, acceptance: float, miss_exponent: float, ranks: int, fan_out: Sequence[int]
    ) -> None:
        self._ranks, self._fan_out = ranks, tuple(fan_out)
        self._seen = np.full(BINS, PRIOR)
        self._right = np.full(BINS, PRIOR * acceptance)
        self._all_seen, self._all_right = PRIOR, PRIOR * acceptance
        missed = np.arange(1.0, ranks + 2.0) ** -miss_exponent
        # The last one is for tokens that are no choice of the draft.
        self._by_rank = PRIOR * np.append(missed[:-1] - missed[1:], missed[-1])
        self._allowed: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @property
    def acceptance(self) -> float:
        """The chance that a first choice is right, of any confidence."""
        return self._all_right / self._all_seen

    def observe(self, confidence: Float32Array, right: int, rank: int | None = None) -> None:
        """Take in one outcome.

        Args:
            confidence: ``[right]`` or ``[right + 1]``, the draft's in its first choices.
            right: how many of them came true; if there is one more, that one did not.
            rank: of the token that came instead among the other choices, from 0 on; one that is
                too high if it was none of them, None if they are not known.
        """
        for i, level in enumerate(_levels(confidence).tolist()):
            came_true = i < right
            self._seen[level] = self._seen[level] * _DECAY + 1.0
            self._right[level] = self._right[level] * _DECAY + came_true
            self._all_seen = self._all_seen * _DECAY + 1.0
            self._all_right = self._all_right * _DECAY + came_true
        if rank is not None:
            self._by_rank *= _DECAY
            self._by_rank[min(rank, self._ranks)] += 1.0

    def forecast(self, verified: int, confidence: Float32Array) -> Forecast:
        """The outcomes to guess when ``verified`` tokens are being verified.

        When fewer than K are, the guesses of the outcomes that cannot happen are given to those
        that can: after a prompt (``verified = 0``) the whole budget goes to ``k = 0``.

        Args:
            verified: n.
            confidence: ``[n]`` or ``[n + 1]``, the draft's in the tokens that are verified and, if
                that is known, in its first choice after them.
        """
        levels = _levels(confidence)
        right = np.full(verified + 1, self.acceptance)
        right[: len(levels)] = self._right[levels] / self._seen[levels]
        reached = np.cumprod(right)  # all up to here are right
        wrong = 1.0 - right
        wrong[1:] *= reached[:-1]
        # That a worse choice came true more often than a better one is noise.
        by_rank = np.sort(self._by_rank[:-1])[::-1] / self._by_rank.sum()
        k, rank = self._may_be_guessed(verified)
        chances = wrong[k] * by_rank[rank]
        order = np.argsort(-chances, kind="stable")
        hit = np.empty(len(k) + 1)
        hit[0] = reached[-1]
        np.cumsum(chances[order], out=hit[1:])
        hit[1:] += hit[0]
        return Forecast(k[order], hit)

    def _may_be_guessed(self, verified: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """k and rank of all outcomes that forks may be made for."""
        found = self._allowed.get(verified)
        if found is None:
            possible = self._fan_out[: verified + 1]
            if sum(possible) == 0:
                possible = (1,) * (verified + 1)
            caps = np.array(apportion([float(f) for f in possible], sum(self._fan_out)))
            caps[verified] -= caps[verified] > 0  # the trunk itself is the first guess after all n
            k, rank = np.nonzero(np.arange(self._ranks) < caps[:, None])
            found = self._allowed[verified] = k, rank
        return found


def _levels(confidence: Float32Array) -> NDArray[np.int64]:
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
