"""What drafted tokens were sampled from: sparse distributions beside the speculation cache."""

from __future__ import annotations

import numpy as np

from vllm_ssd.core.arrays import BoolArray, Float32Array, Int32Array, Int64Array


class Distributions:
    """For every token of the cache's rows the distribution q' that it was sampled from, if any.

    Kept by position in the text, as :attr:`SpeculationCache.chance`: a fork that becomes a trunk
    keeps its row, and with it what its tokens were sampled from.

    Args:
        max_rows: rows of the cache.
        width: tokens a row can hold.
        most: N, the most tokens of a distribution.
    """

    def __init__(self, max_rows: int, width: int, most: int) -> None:
        self.most = most
        self.support: Int32Array = np.zeros((max_rows, width), np.int32)
        """``[row, position % width]``: entries of the distribution; 0: the token was certain."""
        # Not initialised: memory is used only where something has been sampled.
        self._tokens: Int32Array = np.empty((max_rows, width, most), np.int32)
        self._probabilities: Float32Array = np.empty((max_rows, width, most), np.float32)

    def forget(self, rows: Int32Array | list[int]) -> None:
        """Rows begin anew: what they held of another text counts no more."""
        self.support[rows] = 0

    def certain(self, rows: Int32Array, positions: Int32Array) -> None:
        """Tokens were chosen without chance.

        Args:
            rows: ``[n]``.
            positions: ``[..., n]``, of their tokens in the text.
        """
        self.support[rows, positions % self.support.shape[1]] = 0

    def sampled(
        self,
        rows: Int32Array,
        positions: Int32Array,
        supports: Int32Array,
        tokens: Int32Array,
        probabilities: Float32Array,
    ) -> None:
        """Tokens were sampled.

        Args:
            rows: ``[n]``.
            positions: ``[n]``, of their tokens in the text.
            supports: ``[n]``, from how many tokens each was sampled.
            tokens: ``[sum(supports)]``, these tokens.
            probabilities: ``[sum(supports)]``, theirs.
        """
        columns = positions % self.support.shape[1]
        self.support[rows, columns] = supports
        first = supports.cumsum() - supports
        index = np.arange(len(tokens)) - np.repeat(first, supports)
        at = np.repeat(rows, supports), np.repeat(columns, supports), index
        self._tokens[at] = tokens
        self._probabilities[at] = probabilities

    def look_up(
        self, rows: Int64Array, positions: Int64Array
    ) -> tuple[BoolArray, Int64Array, Int32Array, Float32Array]:
        """What tokens were sampled from.

        Args:
            rows: ``[n]``; -1 for tokens that are in no row: they are certain.
            positions: ``[n]``, in the text.

        Returns:
            ``[n]``, which were sampled; and the entries of their distributions, in one row: which
            of the tokens each belongs to, token, probability.
        """
        columns = positions % self.support.shape[1]
        supports = np.where(rows >= 0, self.support[rows, columns], 0)
        sampled = supports > 0
        owners = np.flatnonzero(sampled)
        if not len(owners):
            return sampled, owners, np.empty(0, np.int32), np.empty(0, np.float32)
        most = int(supports.max())
        rows, columns = rows[owners], columns[owners]
        tokens = self._tokens[rows, columns, :most]
        probabilities = self._probabilities[rows, columns, :most]
        entries = np.arange(most) < supports[owners, None]
        of = np.broadcast_to(owners[:, None], entries.shape)[entries]
        return sampled, of, tokens[entries], probabilities[entries]
