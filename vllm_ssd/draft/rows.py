"""The rows of the draft's batch: every trunk and fork of every request, as arrays.

A row is one sequence being decoded: its block table, the token it feeds next, how far it may
grow. One step of all rows is a handful of array operations, whatever their number. The tokens that
a row has grown by are in the trees (:mod:`vllm_ssd.draft.trees`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arrays import BoolArray, Float32Array, Int32Array
from vllm_ssd.core.tree import row_width
from vllm_ssd.draft.model import Choices

MAX_STOP_TOKENS = 8
"""End tokens checked per request; drafting goes on past any further ones."""


class Grown(NamedTuple):
    """How rows grew in a step, ``[m]`` all."""

    rows: Int32Array
    tokens: Int32Array
    """The token each of them grew by."""
    ended: BoolArray
    """Whether it ends with that token."""


class Rows:
    """State of all rows; every array is indexed by row.

    Args:
        max_rows: rows in all.
        max_blocks: KV blocks of the longest text.
        num_speculative_tokens: K.
        num_choices: C, how many best tokens of each position are kept for forks.
    """

    def __init__(
        self, max_rows: int, max_blocks: int, num_speculative_tokens: int, num_choices: int
    ) -> None:
        width = row_width(num_speculative_tokens) + 1
        self.block_table: Int32Array = np.zeros((max_rows, max_blocks), np.int32)
        self.num_blocks: Int32Array = np.zeros(max_rows, np.int32)
        """How many entries of the block table are used."""
        self.start: Int32Array = np.zeros(max_rows, np.int32)
        """Position in the text of the row's token 0 (``cache.tokens[row, 0]``)."""
        self.computed: Int32Array = np.zeros(max_rows, np.int32)
        """How many positions from 0 on have their KV computed."""
        self.pending: BoolArray = np.zeros(max_rows, np.bool_)
        """Whether the row takes part in the next step, feeding one token."""
        self.feed_token: Int32Array = np.zeros(max_rows, np.int32)
        """That token; its position is ``computed``."""
        self.room: Int32Array = np.zeros(max_rows, np.int32)
        """How many tokens the row may still grow by."""
        self.stop: Int32Array = np.full((max_rows, MAX_STOP_TOKENS), -1, np.int32)
        self.choices: Int32Array = np.zeros((max_rows, width, num_choices), np.int32)
        """``[row, i]``: the best tokens at position ``start + i``, best first."""
        self.stated: Float32Array = np.zeros((max_rows, width, num_choices), np.float32)
        """``[row, i]``: the draft's probabilities of these."""
        self.chance: Float32Array = np.zeros(max_rows, np.float32)
        """Of a fork: the chance of its outcome, as estimated when it was made."""
        self._changed: BoolArray = np.zeros(max_rows, np.bool_)
        self.reset()

    def reset(self) -> None:
        """All rows are free."""
        self.pending[:] = False
        self._changed[:] = False
        self._free = list(range(len(self.start) - 1, -1, -1))

    @property
    def free_count(self) -> int:
        """Rows that can be taken."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` free rows. The caller has checked :attr:`free_count`."""
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken

    def give_back(self, rows: list[int]) -> None:
        """Free rows."""
        self.pending[rows] = False
        self._free += rows

    # ---- block tables

    def set_blocks(self, row: int, first: int, block_ids: list[int]) -> None:
        """Set a row's block table from entry ``first`` on; it ends with these blocks."""
        end = first + len(block_ids)
        self.block_table[row, first:end] = block_ids
        self.num_blocks[row] = end
        self._changed[row] = True

    def take_changed(self) -> tuple[Int32Array, Int32Array]:
        """The rows whose block tables changed since the last call, and these tables."""
        rows = np.flatnonzero(self._changed).astype(np.int32)
        self._changed[rows] = False
        width = int(self.num_blocks[rows].max(initial=0))
        return rows, self.block_table[rows, :width]

    # ---- growing

    def rebase(self, row: int, base: int) -> None:
        """Forget what is kept of positions before ``base``."""
        shift = base - int(self.start[row])
        if shift > 0:
            for held in (self.choices[row], self.stated[row]):
                held[:-shift] = held[shift:].copy()
        self.start[row] = base

    def restart(self, row: int, base: int, computed: int) -> None:
        """Make a row begin at ``base``, with ``computed`` positions of its text computed."""
        self.start[row] = base
        self.computed[row] = computed
        self.pending[row] = False

    def resume(self, row: int, length: int) -> int | None:
        """Let an idle row grow again, as far as it has room.

        Args:
            row: has ``length`` tokens.

        Returns:
            The token it grows by at once, if its choices there are known already.
        """
        if self.computed[row] < self.start[row] + length:
            self.pending[row] = True  # it was stopped before it fed its last token
            return None
        if self.room[row] <= 0:
            return None
        index = np.array([row], np.int32)
        grown = self._grow(index, self.choices[row, length, :1].copy())
        return int(grown.tokens[0])

    def take_step(self, rows: Int32Array, choices: Choices) -> Grown:
        """Take in one step's result.

        Args:
            rows: ``[n]``, the rows whose token at position ``computed`` was fed.
            choices: after each of these tokens.
        """
        self.computed[rows] += 1
        self.pending[rows] = False
        at = self.computed[rows] - self.start[rows]
        self.choices[rows, at] = choices.tokens
        self.stated[rows, at] = choices.probabilities
        grows = self.room[rows] > 0
        return self._grow(rows[grows], np.ascontiguousarray(choices.tokens[grows, 0]))

    def _grow(self, rows: Int32Array, tokens: Int32Array) -> Grown:
        self.room[rows] -= 1
        self.feed_token[rows] = tokens
        ended = (tokens[:, None] == self.stop[rows]).any(axis=1)
        self.pending[rows] = ~ended
        return Grown(rows, tokens, ended)
