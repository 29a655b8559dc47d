"""What the outcome models learn from each round.

What a verification was of lies in rows and trees that the next round changes, so it is read at
once. Learning from it waits until the device is busy with the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arrays import Int32Array, Int64Array
from vllm_ssd.core.sampled_outcomes import Ends, Verifications
from vllm_ssd.core.setting_outcomes import SettingOutcomes, choice_of
from vllm_ssd.core.tree import SpeculationCache
from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.rows import Rows
from vllm_ssd.draft.verifications import read_verifications


class _Round(NamedTuple):
    """B verifications as they ended; all are copies."""

    trunks: Verifications
    held: Int32Array
    """``[B, K + 1]``, the tokens of the trunks."""
    confirmed: list[list[int]]
    """The new tokens of each."""
    after: Int32Array
    """``[B, C]``, the draft's choices after the accepted tokens."""
    prepared: Int64Array
    """``[B]``, the last k after which the draft's choices are known."""


class Learning:
    """Reads how verifications ended, and learns from it later.

    Args:
        rows: all rows.
        cache: the trees.
        num_speculative_tokens: K.
        outcomes: learns from every outcome.
    """

    def __init__(
        self,
        rows: Rows,
        cache: SpeculationCache,
        num_speculative_tokens: int,
        outcomes: SettingOutcomes,
    ) -> None:
        self._rows = rows
        self._cache = cache
        self._positions = num_speculative_tokens + 1
        self._outcomes = outcomes
        self._round: _Round | None = None
        """What is to be learned from."""

    def read(self, requests: Sequence[Request], confirmed: Sequence[list[int]]) -> None:
        """Read verifications before they are followed, where the trunk held what was verified.

        Args:
            requests: those verified.
            confirmed: the new tokens of each.
        """
        self.learn()
        known = [
            (request, tokens)
            for request, tokens in zip(requests, confirmed, strict=True)
            if request.trunk != DORMANT and 0 < len(tokens) <= request.verified + 1
        ]
        if not known:
            return
        rows, positions = self._rows, self._positions
        trunk = np.array([request.trunk for request, _ in known], np.int32)
        accepted = np.array([len(tokens) - 1 for _, tokens in known])
        length = np.array([request.length for request, _ in known])
        verified = np.array([request.verified for request, _ in known])
        prepared = rows.computed[trunk] - length
        forced = any(request.forced for request, _ in known)
        self._round = _Round(
            read_verifications(rows, self._cache, trunk, verified, prepared + 1, positions, forced),
            self._cache.tokens[trunk, :positions],
            [tokens for _, tokens in known],
            rows.choices[trunk, accepted],
            prepared,
        )

    def learn(self) -> None:
        """Learn from what was read last, if that has not been done."""
        if self._round is None:
            return
        (trunks, held, confirmed, after, prepared), self._round = self._round, None
        accepted = np.array([len(tokens) - 1 for tokens in confirmed])
        came = choice_of(after, np.array([tokens[-1] for tokens in confirmed], np.int32))
        # [B, K + 1]: the tokens that were accepted, and the one that came then.
        k = np.arange(self._positions)
        right = k < accepted[:, None]
        # What the draft would choose after some of the accepted tokens may not be known yet.
        seen = (k <= accepted[:, None]) & (k <= prepared[:, None])
        same = np.ones(right.shape, np.bool_)
        same[right] = np.concatenate([tokens[:-1] for tokens in confirmed]) == held[right]
        seen[:, 1:] &= np.logical_and.accumulate(same, axis=1)[:, :-1]
        self._outcomes.observe(trunks, Ends(accepted, came, seen))
