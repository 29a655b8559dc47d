"""How verifications end above temperature 0.

Drafted tokens are sampled there, from q', or certain, and the target samples too, from p. At every
position one of these questions decides:

* Is the sampled token accepted? Its chance is min(1, p / q'): learned by its own q', those weighed
  by C apart. Before it is sampled the chance is the sum of min(p, q') over all tokens: learned by
  the largest probability of q', for whoever may not know the sample.
* If it is not, which token comes? It is drawn from max(p - q', 0): learned by the share of each
  choice in what the draft's probabilities leave beside the sampled one, those weighed by C apart.
* Which token does the target emit, whatever is drafted? It decides what follows all n tokens, and
  whether a certain token is accepted: learned by the probability that the draft states.

Each is learned as in :mod:`vllm_ssd.core.outcomes`, in levels of log-odds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from vllm_ssd.core.arrays import BoolArray, Float32Array, Float64Array, Int32Array, Int64Array
from vllm_ssd.core.outcomes import DECAY, LEVEL_CHANCES, PRIOR, Calibration

_AT_LEAST = np.float32(1e-6)


class Verifications(NamedTuple):
    """B verifications: what the draft knows of the tokens that are verified and the one after."""

    setting: Int32Array
    """``[B]``, how each request is drafted for (:class:`vllm_ssd.core.arms.Settings`)."""
    verified: Int64Array
    """``[B]``, n of each, at most K."""
    known: Int64Array
    """``[B]``, at how many positions, from the first on, the choices are known."""
    stated: Float32Array
    """``[B, K + 1, C]``, the draft's probabilities of its choices, best first."""
    choice: Int64Array
    """``[B, K + 1]``, which of the choices the trunk's own token is; -1 for none of them."""
    own: Float32Array
    """``[B, K + 1]``, its probability in q'; 0 if it is certain."""
    likeliest: Float32Array
    """``[B, K + 1]``, the largest probability of q'."""
    weighed: BoolArray
    """``[B, K + 1, C]``, the choices that C has weighed in q'."""

    def where(self, kept: BoolArray | Int64Array) -> Verifications:
        """Some of them."""
        return Verifications._make(values[kept] for values in self)


class Ends(NamedTuple):
    """How B verifications ended."""

    accepted: Int64Array
    """``[B]``, how many tokens were accepted."""
    came: Int64Array
    """``[B]``, which choice of the draft came after them; -1 for none of them."""
    seen: BoolArray
    """``[B, K + 1]``, the positions that something is learned of: none after the one that ended it,
    nor where the draft's choices are not known."""

    def where(self, kept: BoolArray | Int64Array) -> Ends:
        """Some of them."""
        return Ends._make(values[kept] for values in self)


class Emissions:
    """Which of the draft's choices the target emits, at one level of temperatures.

    Args:
        choices: C.
    """

    def __init__(self, choices: int) -> None:
        self._first, self._others = Calibration(), Calibration()
        self.usual = np.full(choices, 0.5 / max(1, choices - 1), np.float32)
        """``[C]``, the average of the stated probabilities."""
        self.usual[0] = 0.5

    def of(self, stated: Float32Array) -> Float64Array:
        """The chance of each choice, ``[..., C]``."""
        chances = np.empty(stated.shape)
        chances[..., 0] = self._first.of(stated[..., 0])
        chances[..., 1:] = self._others.of(stated[..., 1:])
        return chances

    def of_firsts(self, stated: Float32Array) -> Float64Array:
        """The chance of first choices."""
        return self._first.of(stated)

    def observe(self, stated: Float32Array, came: Int64Array) -> None:
        """Take in which choices came, ``[m, C]`` and ``[m]``."""
        if not len(stated):
            return
        hits = np.arange(stated.shape[1]) == came[:, None]
        self._first.observe(stated[:, 0], hits[:, 0])
        self._others.observe(stated[:, 1:], hits[:, 1:])
        faded = DECAY ** len(stated)
        self.usual = (self.usual * faded + (1.0 - faded) * stated.mean(axis=0)).astype(np.float32)


class SampledOutcomes:
    """Learns how verifications end, of requests with one setting.

    Args:
        emissions: of the level of its temperatures.
    """

    def __init__(self, emissions: Emissions) -> None:
        self._emissions = emissions
        # Until it is known, the chance is taken to be in the middle between q' and certainty.
        halfway = 0.5 + 0.5 * LEVEL_CHANCES
        self._accepted = Calibration(halfway), Calibration(halfway)
        self._shape = Calibration(halfway)
        self._recovered = Calibration(), Calibration()
        self._judged, self._right = PRIOR, 0.5 * PRIOR

    def acceptance_by_shape(self, likeliest: Float32Array) -> Float64Array:
        """The chance that a token is accepted, by the largest probability of its q'."""
        return self._shape.of(likeliest)

    def chances(self, trunks: Verifications) -> Float64Array:
        """How likely each outcome is; as :meth:`vllm_ssd.core.outcomes.OutcomeModel.chances`.

        Returns:
            ``[B, K + 1, C]``. For k < n the trunk's own token has a chance of 0.
        """
        n, stated = trunks.verified, trunks.stated
        k = np.arange(stated.shape[1])
        unknown = k >= trunks.known[:, None]
        if unknown.any():
            stated = stated.copy()
            stated[unknown] = self._emissions.usual
        emitted = self._emissions.of(stated)
        right = self._right_ones(trunks, emitted)
        right[unknown] = self._right / self._judged
        before = np.ones(right.shape)
        np.cumprod(right[:, :-1], axis=1, out=before[:, 1:])

        certain = trunks.own == 0.0
        chances = np.where(certain[..., None], emitted, self._after_rejections(trunks, stated))
        _clear_own(chances, trunks.choice)
        if certain.any():
            # Given that the certain token is not emitted.
            chances[certain] /= np.maximum(1.0 - right[certain], 1e-6)[:, None]
        chances /= np.maximum(1.0, chances.sum(axis=2, keepdims=True))
        chances *= (before * (1.0 - right))[..., None]
        chances[k > n[:, None]] = 0.0
        at_end = np.arange(len(n)), n
        after_all = emitted[at_end]
        after_all /= np.maximum(1.0, after_all.sum(axis=1, keepdims=True))
        chances[at_end] = before[at_end][:, None] * after_all
        return chances

    def observe(self, trunks: Verifications, ends: Ends) -> None:
        """Take in how verifications ended."""
        k = np.arange(trunks.stated.shape[1])
        last = ends.accepted[:, None]
        judged = ends.seen & (k < trunks.verified[:, None])
        accepted = k < last
        sampled = judged & (trunks.own > 0.0)
        heavy, light = self._accepted
        own_weighed = _of_own(trunks.weighed, trunks.choice)
        for calibration, which in (
            (heavy, sampled & ~own_weighed),
            (light, sampled & own_weighed),
        ):
            calibration.observe(trunks.own[which], accepted[which])
        self._shape.observe(trunks.likeliest[sampled], accepted[sampled])
        count = np.count_nonzero(judged)
        faded = DECAY**count
        self._judged = self._judged * faded + count
        self._right = self._right * faded + np.count_nonzero(judged & accepted)

        came = np.where(accepted, trunks.choice, ends.came[:, None])
        emitted = ends.seen & ~sampled
        self._emissions.observe(trunks.stated[emitted], came[emitted])
        rejected = sampled & ~accepted
        if rejected.any():
            shares = _shares(trunks.stated[rejected], trunks.choice[rejected])
            hits = np.arange(shares.shape[1]) == came[rejected][:, None]
            others = np.arange(shares.shape[1]) != trunks.choice[rejected][:, None]
            weighed = trunks.weighed[rejected]
            for calibration, which in zip(
                self._recovered, (others & ~weighed, others & weighed), strict=True
            ):
                calibration.observe(shares[which], hits[which])

    def _right_ones(self, trunks: Verifications, emitted: Float64Array) -> Float64Array:
        """The chance that the trunk's own tokens are accepted, ``[B, K + 1]``."""
        heavy, light = self._accepted
        sampled = heavy.of(trunks.own)
        if trunks.weighed.any():
            own_weighed = _of_own(trunks.weighed, trunks.choice)
            sampled = np.where(own_weighed, light.of(trunks.own), sampled)
        certain = _of_own(emitted, trunks.choice)
        return np.where(trunks.own > 0.0, sampled, certain)

    def _after_rejections(self, trunks: Verifications, stated: Float32Array) -> Float64Array:
        """The chance of each choice after the trunk's own sampled token was rejected."""
        heavy, light = self._recovered
        shares = _shares(stated, trunks.choice)
        recovered = heavy.of(shares)
        if trunks.weighed.any():
            recovered = np.where(trunks.weighed, light.of(shares), recovered)
        return recovered


def _of_own(values: BoolArray | Float64Array | Float32Array, choice: Int64Array) -> Any:
    """``[..., C]`` at the trunk's own choice, ``[...]``; 0 where it is none of them."""
    flat, at = values.reshape(-1, values.shape[-1]), choice.ravel()
    own = flat[np.arange(len(flat)), at]
    own[at < 0] = 0
    return own.reshape(choice.shape)


def _clear_own(chances: Float64Array, choice: Int64Array) -> None:
    """Set the chances of the trunk's own choices to 0."""
    among = np.nonzero(choice >= 0)
    chances[(*among, choice[among])] = 0.0


def _shares(stated: Float32Array, choice: Int64Array) -> Float32Array:
    """The choices' shares of what the trunk's own token leaves them, ``[..., C]``."""
    left = np.maximum(np.float32(1.0) - _of_own(stated, choice), _AT_LEAST)
    shares: Float32Array = np.minimum(stated / left[..., None], np.float32(1.0))
    return shares
