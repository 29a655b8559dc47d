"""How verifications end: how many drafted tokens are accepted, which token follows them.

An outcome is ``(k, t*)``: ``k`` of the ``n`` verified tokens were accepted and the target
emitted ``t*`` after them. One question decides it at every position: is the draft's first choice
right? The target accepts it as often as it would emit it. ``k`` is the first position where it is
wrong; ``t*`` is then one of the draft's other choices. If all n are right, ``t*`` is the first
choice after them or, again, another one.

The draft states a probability for each of its choices. How often a choice with a given stated
probability turns out right is learned from the verifications seen (:class:`Calibration`),
separately for first choices and for the others. Until then the stated probability is used.
"""

from __future__ import annotations

import numpy as np

from vllm_ssd.core.arrays import BoolArray, Float32Array, Float64Array, Int64Array

PRIOR = 10.0
"""How many observations the stated probability counts for, at each level."""
MEMORY = 1000
"""Number of observations after which the weight of an older one has fallen to 1 / e."""
DECAY = 1.0 - 1.0 / MEMORY
_ODDS = np.arange(-8.0, 9.0)
"""The log-odds of each level: 0.88 and 0.9999 are seven levels apart."""
LEVEL_CHANCES: Float64Array = 1.0 / (1.0 + np.exp(-_ODDS))
"""The probability in the middle of each level."""
_EDGES = (1.0 / (1.0 + np.exp(0.5 - _ODDS[1:]))).astype(np.float32)
"""Probabilities at which one level ends and the next begins."""
_ALMOST_CERTAIN = np.float32(1.0 - 1e-6)


class Calibration:
    """How often a choice is right, by the probability stated for it, in levels of log-odds.

    Args:
        at_first: ``[levels]``, what is used until something was observed: by default the stated
            probability.
    """

    def __init__(self, at_first: Float64Array = LEVEL_CHANCES) -> None:
        self._seen = np.full(len(_ODDS), PRIOR)
        self._true = PRIOR * at_first

    def observe(self, stated: Float32Array, correct: BoolArray) -> None:
        """Take in stated probabilities and, in the same shape, which choices were right."""
        levels, hits = np.searchsorted(_EDGES, stated.ravel()), correct.ravel()
        seen = np.bincount(levels, minlength=len(_ODDS))
        true = np.bincount(levels[hits], minlength=len(_ODDS))
        faded = DECAY**seen
        self._seen = self._seen * faded + seen
        self._true = self._true * faded + true

    def of(self, stated: Float32Array) -> Float64Array:
        """The chance that each choice is right, in the shape of ``stated``."""
        chances: Float64Array = (self._true / self._seen)[np.searchsorted(_EDGES, stated)]
        return chances


class OutcomeModel:
    """Learns how likely the outcomes are.

    Args:
        choices: C, how many next tokens the draft names at each position, its first one included.
    """

    def __init__(self, choices: int) -> None:
        self._first, self._others = Calibration(), Calibration()
        # The average of the stated probabilities, used for positions not computed yet.
        self._usual = np.full(choices, 0.5 / max(1, choices - 1))
        self._usual[0] = 0.5

    def acceptance_of(self, stated: Float32Array) -> Float32Array:
        """The chance that first choices are accepted, by the probabilities stated for them."""
        return self._first.of(stated).astype(np.float32)

    def observe(self, stated: Float32Array, came: Int64Array) -> None:
        """Take in which choice of the draft the target emitted at verified positions.

        Args:
            stated: ``[m, C]``, the draft's probabilities of its choices, best first.
            came: ``[m]``, which of the choices it was; -1 for none of them.
        """
        count = len(stated)
        if not count:
            return
        right = came == 0
        self._first.observe(stated[:, 0], right)
        faded = DECAY**count
        self._usual = self._usual * faded + (1.0 - faded) * stated.mean(axis=0)
        wrong = ~right
        if wrong.any():
            others = np.arange(1, stated.shape[1]) == came[wrong, None]
            self._others.observe(_shares(stated[wrong]), others)

    def chances(
        self,
        verified: Int64Array,
        known: Int64Array,
        stated: Float32Array,
        drafted: Int64Array | None = None,
    ) -> Float64Array:
        """How likely each outcome of each of B verifications is.

        Args:
            verified: ``[B]``, n of each, at most K.
            known: ``[B]``, at how many positions, from the first on, the choices are known.
            stated: ``[B, K + 1, C]``, the draft's probabilities of its choices, best first.
            drafted: ``[B, K + 1]``, which of the choices each verified token is; -1: none of them.
                None: all are first choices.

        Returns:
            ``[B, K + 1, C]``: the chance that k tokens are accepted and choice c follows them. It
            is 0 for k > n, and for k < n at the token drafted: it cannot follow its own rejection.
        """
        k = np.arange(stated.shape[1])
        unknown = k >= known[:, None]
        if unknown.any():
            stated = stated.copy()
            stated[unknown] = self._usual
        if drafted is not None:
            return self._chances_of_others(verified, stated, drafted)
        first = self._first.of(stated[..., 0])
        reached = np.cumprod(first, axis=1)  # all up to and including this one are right
        wrong = 1.0 - first
        wrong[:, 1:] *= reached[:, :-1]
        wrong[k > verified[:, None]] = 0.0
        chances = np.empty(stated.shape)
        np.multiply(wrong[..., None], self._others.of(_shares(stated)), out=chances[..., 1:])
        chances[..., 0] = np.where(k == verified[:, None], reached, 0.0)
        return chances

    def _chances_of_others(
        self, verified: Int64Array, stated: Float32Array, drafted: Int64Array
    ) -> Float64Array:
        """As :meth:`chances`, where some of the verified tokens are not first choices."""
        chances = np.empty(stated.shape)
        first = chances[..., 0] = self._first.of(stated[..., 0])
        others = self._others.of(_shares(stated))
        np.multiply((1.0 - first)[..., None], others, out=chances[..., 1:])
        at = np.maximum(drafted, 0)[..., None]
        accepted = np.take_along_axis(chances, at, axis=2)[..., 0]
        none_of_them = np.clip(1.0 - chances.sum(axis=2), 0.0, 1.0)
        accepted = np.where(drafted >= 0, accepted, none_of_them)
        chances[:, 1:] *= np.cumprod(accepted, axis=1)[:, :-1, None]
        k = np.arange(stated.shape[1])
        chances[k > verified[:, None]] = 0.0
        rejected = (k < verified[:, None]) & (drafted >= 0)
        request, position = np.nonzero(rejected)
        chances[request, position, drafted[rejected]] = 0.0
        return chances


def _shares(stated: Float32Array) -> Float32Array:
    """``[..., C - 1]``: the others' shares of what the first choice leaves them."""
    left = np.float32(1.0) - np.minimum(stated[..., :1], _ALMOST_CERTAIN)
    shares: Float32Array = stated[..., 1:] / left
    return shares
