"""What drafted tokens were sampled from: sparse distributions beside the speculation cache."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vllm_ssd.core.arrays import Float32Array, Int32Array, Int64Array

_ENTRIES = 1 << 20
"""Entries that are kept at least: 8 MiB."""
_STEPS = 4
"""... and enough for so many steps in which all rows sample."""

ROUNDING = 1e-4
"""How far the probabilities of a distribution may be from 1 in all."""


def dense_bytes(requests: int, depth: int, vocab_size: int) -> int:
    """Bytes of the distributions of so many requests' proposals over the whole vocabulary."""
    return requests * depth * vocab_size * 4


class Kept(Protocol):
    """What the published trees tell of it; see :class:`Distributions`."""

    most: int

    @property
    def empty(self) -> bool:
        """Whether there is nothing to forget."""
        ...

    def forget(self, rows: Int32Array | Int64Array | list[int]) -> None:
        """Rows begin anew."""
        ...

    def certain(self, rows: Int32Array | Int64Array, positions: Int32Array) -> None:
        """Tokens were chosen without chance."""
        ...

    def sampled(
        self,
        rows: Int32Array | Int64Array,
        positions: Int32Array,
        supports: Int32Array,
        tokens: Int32Array,
        probabilities: Float32Array,
        drafted: Int32Array,
    ) -> None:
        """Tokens were sampled."""
        ...


class Distributions:
    """For every token of the cache's rows the distribution q' that it was sampled from, if any.

    Known by position in the text: a fork that becomes a trunk keeps its row, and with it what its
    tokens were sampled from. The entries themselves are kept in
    the order in which they come, the newest in place of the oldest: few of the tokens are ever
    proposed, so nothing is done for each of them. A token whose entries are gone counts as certain,
    which is exact for a sampled token as well (:mod:`vllm_ssd.target.v1.handover`).

    Args:
        max_rows: rows of the cache.
        width: tokens a row can hold.
        most: N, the most tokens of a distribution.
    """

    def __init__(self, max_rows: int, width: int, most: int) -> None:
        self.most = most
        self.support: Int32Array = np.zeros((max_rows, width), np.int32)
        """``[row, position % width]``: entries of the distribution; 0: the token was certain."""
        self._first: Int64Array = np.zeros((max_rows, width), np.int64)
        """The number of its first entry, counted from the first one that ever came."""
        self._size = max(_ENTRIES, _STEPS * max_rows * most)
        self._tokens: Int32Array = np.empty(self._size, np.int32)
        self._probabilities: Float32Array = np.empty(self._size, np.float32)
        self._came = 0

    @property
    def empty(self) -> bool:
        """Whether all tokens that ever came were certain: then there is nothing to forget."""
        return not self._came

    def forget(self, rows: Int32Array | Int64Array | list[int]) -> None:
        """Rows begin anew: what they held of another text counts no more."""
        if self.empty:
            return
        self.support[rows] = 0

    def certain(self, rows: Int32Array | Int64Array, positions: Int32Array) -> None:
        """Tokens were chosen without chance.

        Args:
            rows: ``[n]``.
            positions: ``[..., n]``, of their tokens in the text.
        """
        if self.empty:
            return
        self.support[rows, positions % self.support.shape[1]] = 0

    def sampled(
        self,
        rows: Int32Array | Int64Array,
        positions: Int32Array,
        supports: Int32Array,
        tokens: Int32Array,
        probabilities: Float32Array,
        drafted: Int32Array,
    ) -> None:
        """Tokens were sampled.

        Args:
            rows: ``[n]``.
            positions: ``[n]``, of their tokens in the text.
            supports: ``[n]``, from how many tokens each was sampled.
            tokens: ``[sum(supports)]``, these tokens.
            probabilities: ``[sum(supports)]``, theirs.
            drafted: ``[n]``, which was sampled; not kept, the cache has it.
        """
        if len(tokens) > self._size:
            # The newest ones are kept.
            after = supports[::-1].cumsum()[::-1]
            kept = int(np.argmax(after <= self._size))
            self.certain(rows[:kept], positions[:kept])
            rows, positions, supports = rows[kept:], positions[kept:], supports[kept:]
            tokens, probabilities = tokens[-after[kept] :], probabilities[-after[kept] :]
        count, at = len(tokens), self._came % self._size
        if at + count > self._size:
            self._came += self._size - at
            at = 0
        self._tokens[at : at + count] = tokens
        self._probabilities[at : at + count] = probabilities
        columns = positions % self.support.shape[1]
        self.support[rows, columns] = supports
        self._first[rows, columns] = self._came + supports.cumsum() - supports
        self._came += count

    def look_up(
        self, rows: Int64Array, positions: Int64Array
    ) -> tuple[Int64Array, Int32Array, Float32Array]:
        """What tokens were sampled from.

        Args:
            rows: ``[n]``; -1 for tokens that are in no row: they are certain.
            positions: ``[n]``, in the text.

        Returns:
            The supports, ``[n]``; and the entries of their distributions, in one row: tokens and
            probabilities.
        """
        columns = positions % self.support.shape[1]
        first = self._first[rows, columns]
        there = (rows >= 0) & (first >= self._came - self._size)
        supports = np.where(there, self.support[rows, columns], 0).astype(np.int64)
        before = supports.cumsum() - supports
        entries = np.arange(supports.sum()) + np.repeat(first % self._size - before, supports)
        return supports, self._tokens[entries], self._probabilities[entries]
