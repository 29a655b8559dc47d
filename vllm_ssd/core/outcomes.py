"""How verifications end: how many drafted tokens are accepted, which token follows them.

An outcome is ``(k, t*)``: ``k`` of the ``n`` verified tokens were accepted and the target
emitted ``t*`` after them. One question decides it at every position: is the draft's first choice
right? The target accepts it as often as it would emit it. Where it is wrong for the first time k
ends, and ``t*`` is one of the draft's other choices there. If all n are right, ``t*`` is the first
choice after them or, again, another one.

The draft states a probability for each of its choices. How often what is stated so comes true is
learned from the verifications seen (:class:`Calibration`), for first choices and for the others
apart. Until then the draft is taken at its word.
"""

from __future__ import annotations

import numpy as np

from vllm_ssd.core.arrays import BoolArray, Float32Array, Float64Array, Int64Array

PRIOR = 10.0
"""How many observations the draft's own word is worth, at each level."""
MEMORY = 1000
"""Observations after which one counts for a third."""
_DECAY = 1.0 - 1.0 / MEMORY
_LAST_LEVEL = 16
_EVEN_ODDS = 8
"""The level of a probability of one half; there is one for each unit of log-odds."""
_ALMOST = 1e-6


class Calibration:
    """How often something comes true, by the probability stated for it.

    Seventeen levels, one for each unit of log-odds: 0.88 and 0.9999 are seven levels apart.
    """

    def __init__(self) -> None:
        odds = np.arange(_LAST_LEVEL + 1.0) - _EVEN_ODDS
        self._seen = np.full(_LAST_LEVEL + 1, PRIOR)
        self._true = PRIOR / (1.0 + np.exp(-odds))

    def observe(self, stated: Float32Array, came_true: BoolArray) -> None:
        """Take in what was stated and whether it came true, ``[m]`` both."""
        levels = _levels(stated)
        seen = np.bincount(levels, minlength=len(self._seen))
        faded = _DECAY**seen
        self._seen = self._seen * faded + seen
        self._true = self._true * faded + np.bincount(
            levels, weights=came_true, minlength=len(self._seen)
        )

    def of(self, stated: Float32Array) -> Float64Array:
        """The chance that each comes true, in the shape of ``stated``."""
        chances: Float64Array = (self._true / self._seen)[_levels(stated)]
        return chances


class OutcomeModel:
    """Learns how likely the outcomes are.

    Args:
        choices: C, how many next tokens the draft names at each position, its first one included.
    """

    def __init__(self, choices: int) -> None:
        self._first, self._others = Calibration(), Calibration()
        self._seen, self._right = PRIOR, 0.5 * PRIOR
        # What the draft states on average stands for positions it has not come to yet.
        self._usual = np.full(choices, 0.5 / max(1, choices - 1))
        self._usual[0] = 0.5

    @property
    def acceptance(self) -> float:
        """The chance that a first choice is right, whatever the draft states for it."""
        return self._right / self._seen

    def observe(self, stated: Float32Array, right: int, other: int | None = None) -> None:
        """Take in one outcome.

        Args:
            stated: ``[right, C]`` or ``[right + 1, C]``, the draft's probabilities of its choices
                where it was verified, best first.
            right: how many first choices came true; if there is one more, that one did not.
            other: which of the choices came instead, from 1 on; 0 if it was none of them, None if
                it is not known.
        """
        if not len(stated):
            return
        came_true = np.arange(len(stated)) < right
        self._first.observe(stated[:, 0], came_true)
        faded = _DECAY ** len(stated)
        self._seen = self._seen * faded + len(stated)
        self._right = self._right * faded + right
        self._usual = self._usual * faded + (1.0 - faded) * stated.mean(axis=0)
        if other is not None and len(stated) > right:
            shares = _shares(stated[right:])[0]
            self._others.observe(shares, np.arange(1, len(shares) + 1) == other)

    def chances(self, verified: int, stated: Float32Array) -> Float64Array:
        """How likely each outcome of a verification of ``verified`` tokens is.

        Args:
            verified: n.
            stated: ``[m, C]``, the draft's probabilities of its choices at the first positions, as
                far as they are known (m from 0 to n + 1), best first.

        Returns:
            ``[n + 1, C]``: that k tokens are accepted and choice c after them follows. Choice 0 is
            the drafted token for k < n, which cannot follow its own rejection: 0 there.
        """
        missing = verified + 1 - len(stated)
        if missing > 0:
            usual = np.broadcast_to(self._usual.astype(np.float32), (missing, stated.shape[1]))
            stated = np.concatenate([stated, usual])
        first = self._first.of(stated[:, 0])
        reached = np.cumprod(first)  # all up to and including this one are right
        wrong = 1.0 - first
        wrong[1:] *= reached[:-1]
        chances = np.empty(stated.shape)
        chances[:, 0] = 0.0
        chances[-1, 0] = reached[-1]
        chances[:, 1:] = wrong[:, None] * self._others.of(_shares(stated))
        return chances


def _shares(stated: Float32Array) -> Float32Array:
    """``[m, C - 1]``, the others' shares of what the first choice leaves, ``stated: [m, C]``."""
    left = np.maximum(1.0 - stated[:, :1], _ALMOST)
    shares: Float32Array = stated[:, 1:] / left
    return shares


def _levels(stated: Float32Array) -> Int64Array:
    """The level of each probability."""
    p = np.clip(stated, _ALMOST, 1.0 - _ALMOST)
    odds = np.log(p / (1.0 - p))
    levels: Int64Array = np.clip(np.rint(odds) + _EVEN_ODDS, 0, _LAST_LEVEL).astype(np.int64)
    return levels
