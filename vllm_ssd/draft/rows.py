"""The rows of the draft's batch: every trunk and fork of every request, as arrays.

A row is one sequence being decoded: its block table, the token it feeds next, how far it may
grow. One step of all rows is a handful of array operations, whatever their number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vllm_ssd.core.arrays import Float32Array, Int32Array
from vllm_ssd.core.tree import SpeculationCache
from vllm_ssd.draft.model import Choices

MAX_STOP_TOKENS = 8
"""End tokens checked per request; a request with more merely drafts past the others."""


class Rows:
    """State of all rows; every array is indexed by row.

    Args:
        max_rows: rows in all.
        max_blocks: KV blocks of the longest text.
        num_speculative_tokens: K.
        num_candidates: C, how many best tokens of each position are kept for forks.
    """

    def __init__(
        self, max_rows: int, max_blocks: int, num_speculative_tokens: int, num_candidates: int
    ) -> None:
        width = 2 * num_speculative_tokens + 2
        self.cache = SpeculationCache(max_rows, width)
        self.block_table: Int32Array = np.zeros((max_rows, max_blocks), np.int32)
        self.start: Int32Array = np.zeros(max_rows, np.int32)
        """Position in the text of the row's token 0 (``cache.tokens[row, 0]``)."""
        self.computed: Int32Array = np.zeros(max_rows, np.int32)
        """How many positions from 0 on have their KV computed."""
        self.pending: NDArray[np.bool_] = np.zeros(max_rows, np.bool_)
        """Whether the row takes part in the next step, feeding one token."""
        self.feed_token: Int32Array = np.zeros(max_rows, np.int32)
        """That token; its position is ``computed``."""
        self.room: Int32Array = np.zeros(max_rows, np.int32)
        """How many tokens the row may still grow by."""
        self.stop: Int32Array = np.full((max_rows, MAX_STOP_TOKENS), -1, np.int32)
        self.candidates: Int32Array = np.zeros((max_rows, width + 1, num_candidates), np.int32)
        """``[row, i]``: the best tokens at position ``start + i``, best first."""
        self.confidence: Float32Array = np.zeros((max_rows, width + 1), np.float32)
        """``[row, i]``: the draft's in the first of them."""
        self._free = list(range(max_rows - 1, -1, -1))

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

    def rebase(self, row: int, base: int) -> None:
        """Forget a row's tokens before position ``base``."""
        shift = base - int(self.start[row])
        if shift > 0:
            for held in (self.cache.tokens[row], self.candidates[row], self.confidence[row]):
                held[:-shift] = held[shift:].copy()
        self.cache.length[row] -= shift
        self.start[row] = base

    def restart(self, row: int, base: int, computed: int) -> None:
        """Make a row empty from ``base`` on, with ``computed`` positions of its text computed."""
        self.cache.length[row] = 0
        self.cache.ended[row] = False
        self.start[row] = base
        self.computed[row] = computed
        self.pending[row] = False

    def resume(self, row: int) -> None:
        """Let a row that rests grow again, as far as it has room."""
        length = int(self.cache.length[row])
        if self.computed[row] < self.start[row] + length:
            # It was stopped before it fed its last token.
            self.pending[row] = True
        elif self.room[row] > 0:
            self._grow(np.array([row], np.int32), self.candidates[row, length, :1].copy())

    def take_step(self, rows: Int32Array, choices: Choices) -> tuple[Int32Array, Int32Array]:
        """Take in one step's result.

        Args:
            rows: ``[n]``, the rows whose token at position ``computed`` was fed.
            choices: after each of these tokens.

        Returns:
            The rows that grew and the token each grew by, ``[m]`` both.
        """
        self.computed[rows] += 1
        self.pending[rows] = False
        at = self.computed[rows] - self.start[rows]
        self.candidates[rows, at] = choices.tokens
        self.confidence[rows, at] = choices.confidence
        grows = self.room[rows] > 0
        grown = rows[grows]
        tokens = np.ascontiguousarray(choices.tokens[grows, 0])
        self._grow(grown, tokens)
        return grown, tokens

    def _grow(self, rows: Int32Array, tokens: Int32Array) -> None:
        self.cache.append(rows, tokens)
        self.room[rows] -= 1
        self.feed_token[rows] = tokens
        ended = (tokens[:, None] == self.stop[rows]).any(axis=1)
        self.cache.ended[rows] = ended
        self.pending[rows] = ~ended
