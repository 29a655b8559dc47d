"""How verifications end, learned apart for greedy requests and for each setting above them."""

from __future__ import annotations

import numpy as np

from vllm_ssd.core.arms import LEVELS, Settings
from vllm_ssd.core.arrays import BoolArray, Float32Array, Float64Array, Int32Array, Int64Array
from vllm_ssd.core.outcomes import DECAY, PRIOR, OutcomeModel
from vllm_ssd.core.sampled_outcomes import Emissions, Ends, SampledOutcomes, Verifications


class SettingOutcomes:
    """The outcome models of all settings.

    Args:
        choices: C, how many next tokens the draft names at each position.
        settings: the settings that there are.
    """

    def __init__(self, choices: int, settings: Settings) -> None:
        self._greedy = OutcomeModel(choices)
        self._emissions = [Emissions(choices) for _ in range(LEVELS)]
        arms = len(settings.arms)
        # By setting, from 1 on.
        self._sampled = [
            SampledOutcomes(self._emissions[i // arms]) for i in range(settings.count - 1)
        ]
        self._arms = arms
        self._seen, self._right = PRIOR, 0.5 * PRIOR

    @property
    def acceptance(self) -> float:
        """The chance that a drafted token is accepted, over all requests."""
        return self._right / self._seen

    def acceptance_of(
        self,
        setting: Int32Array,
        stated: Float32Array,
        sampled: BoolArray,
        likeliest: Float32Array,
    ) -> Float32Array:
        """The chance that tokens are accepted, whichever was sampled; ``[m]`` all.

        Args:
            setting: of their requests.
            stated: the draft's probability of its first choice.
            sampled: whether they are samples; else they are first choices.
            likeliest: the largest probability of their q'.
        """
        if not setting.any():
            return self._greedy.acceptance_of(stated)
        chances = np.empty(len(setting), np.float32)
        for one in _present(setting):
            of_one = setting == one
            if not one:
                chances[of_one] = self._greedy.acceptance_of(stated[of_one])
                continue
            drawn, certain = of_one & sampled, of_one & ~sampled
            if drawn.any():
                chances[drawn] = self._sampled[one - 1].acceptance_by_shape(likeliest[drawn])
            if certain.any():
                emissions = self._emissions[(one - 1) // self._arms]
                chances[certain] = emissions.of_firsts(stated[certain])
        return chances

    def observe(self, trunks: Verifications, ends: Ends) -> None:
        """Take in how verifications ended."""
        k = np.arange(trunks.stated.shape[1])
        right = k < ends.accepted[:, None]
        greedy = trunks.setting == 0
        seen = ends.seen & greedy[:, None]
        came = np.where(right, trunks.choice, ends.came[:, None])
        self._greedy.observe(trunks.stated[seen], came[seen])
        # Of greedy requests the token after all n says as much as the others.
        counted = seen | (ends.seen & (k < trunks.verified[:, None]))
        count, hits = np.count_nonzero(counted), np.count_nonzero(counted & (came == 0))
        if not greedy.all():
            hits = np.count_nonzero(counted & np.where(greedy[:, None], came == 0, right))
            for one in _present(trunks.setting):
                of_one = trunks.setting == one
                if one and of_one.all():
                    self._sampled[one - 1].observe(trunks, ends)
                elif one:
                    self._sampled[one - 1].observe(trunks.where(of_one), ends.where(of_one))
        faded = DECAY**count
        self._seen = self._seen * faded + count
        self._right = self._right * faded + hits

    def chances(self, trunks: Verifications) -> Float64Array:
        """How likely each outcome is, ``[B, K + 1, C]``.

        For k < n the trunk's own token has a chance of 0: it cannot follow its own rejection.
        """
        setting = trunks.setting
        if not setting.any():
            return self._of_greedy(trunks)
        chances = np.empty(trunks.stated.shape)
        for one in _present(setting):
            of_one = setting == one
            of = self._sampled[one - 1].chances if one else self._of_greedy
            if of_one.all():
                return of(trunks)
            chances[of_one] = of(trunks.where(of_one))
        return chances

    def _of_greedy(self, trunks: Verifications) -> Float64Array:
        """The same, of greedy requests."""
        drafted = trunks.choice if trunks.choice.any() else None
        return self._greedy.chances(trunks.verified, trunks.known, trunks.stated, drafted)


def _present(setting: Int32Array) -> list[int]:
    """The settings that there are among these."""
    found: list[int] = np.flatnonzero(np.bincount(setting)).tolist()
    return found


def choice_of(choices: Int32Array, tokens: Int32Array) -> Int64Array:
    """Which of the choices, ``[..., C]``, each token, ``[...]``, is; -1 for none of them."""
    same = choices == tokens[..., None]
    found: Int64Array = np.where(same.any(axis=-1), same.argmax(axis=-1), -1)
    return found
