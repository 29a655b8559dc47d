"""The rows of the draft's batch: every trunk and fork of every request, as arrays.

A row is one sequence being decoded: the token it feeds next, how far it may grow, what changes in
its block table. One step of all rows is a handful of array operations, whatever their number. The
tokens that a row has grown by are in the trees (:mod:`vllm_ssd.draft.trees`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arrays import BoolArray, Float32Array, Int32Array
from vllm_ssd.core.tree import row_width
from vllm_ssd.draft.model import Choices, Sampling
from vllm_ssd.draft.sampled_rows import Drawn, SampledRows
from vllm_ssd.draft.table_changes import TableChanges
from vllm_ssd.wire.messages import MAX_STOP_TOKENS


class Grown(NamedTuple):
    """How rows grew in a step, ``[m]`` all."""

    rows: Int32Array
    tokens: Int32Array
    """The token each of them grew by."""
    ended: BoolArray
    """Whether it ends with that token."""
    stated: Float32Array
    """The draft's probability of its first choice there, or of a token forced on the row."""
    setting: Int32Array
    """How its request is drafted for (:class:`vllm_ssd.core.arms.Settings`)."""
    sampled: BoolArray
    """Whether the token was sampled; the others are certain."""
    likeliest: Float32Array
    """The largest probability of the q' it was sampled from; 1 if it is certain."""
    q_tokens: Int32Array
    """``[sampled, N]``: what the sampled ones were sampled from ..."""
    q_probabilities: Float32Array
    """``[sampled, N]``, ... and its probabilities, q'."""

    def of(self, which: BoolArray) -> Grown:
        """That of some rows."""
        drawn = which[self.sampled]
        return Grown(
            self.rows[which],
            self.tokens[which],
            self.ended[which],
            self.stated[which],
            self.setting[which],
            self.sampled[which],
            self.likeliest[which],
            self.q_tokens[drawn],
            self.q_probabilities[drawn],
        )


class Rows:
    """State of all rows; every array is indexed by row.

    Args:
        max_rows: rows in all.
        num_speculative_tokens: K.
        num_choices: C, how many best tokens of each position are kept for forks.
        num_sampled_from: N, sampled tokens come from so many; 0: none are sampled.
    """

    def __init__(
        self,
        max_rows: int,
        num_speculative_tokens: int,
        num_choices: int,
        num_sampled_from: int = 0,
    ) -> None:
        width = row_width(num_speculative_tokens) + 1
        self.owner: Int32Array = np.zeros(max_rows, np.int32)
        """:attr:`vllm_ssd.draft.share.Share.index` of the target that a row was last taken for."""
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
        self.sampled = SampledRows(max_rows, width, num_speculative_tokens, num_sampled_from)
        self.forced: Int32Array = np.full((max_rows, width), -1, np.int32)
        """``[row, i]``: the token that a trunk grows by at position ``start + i`` in place of its
        own choice; -1 for none."""
        self._forced: set[int] = set()
        """The rows that may have any of these."""
        self.chance: Float32Array = np.zeros(max_rows, np.float32)
        """Of a fork: the chance of its outcome, as estimated when it was made."""
        self.tables = TableChanges()
        self._ahead: BoolArray = np.zeros(max_rows, np.bool_)
        """The rows of a step that was launched ahead."""
        self._waiting: list[int] = []
        """Free as soon as the result of that step is taken: it is not for their next owner."""
        self.free_others([])

    def free_others(self, held: list[int]) -> None:
        """Free all rows but these; no step is under way."""
        free = np.ones(len(self.start), np.bool_)
        free[held] = False
        self._free = np.flatnonzero(free)[::-1].tolist()
        self._waiting.clear()
        self._ahead[:] = False
        self.pending[free] = False
        self.tables.drop(self._free)
        self.forced[free] = -1
        self._forced.intersection_update(held)

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
        self.tables.drop(rows)
        for row in self._forced.intersection(rows):
            self._force_none(row)
        for row in rows:
            (self._waiting if self._ahead[row] else self._free).append(row)

    def is_free_at_once(self, row: int) -> bool:
        """Whether a row that is given back now can be taken now."""
        return not self._ahead[row]

    def launched_ahead(self, rows: Int32Array) -> None:
        """A step of these rows is under way; the one before it has been taken."""
        self._free += self._waiting
        self._waiting.clear()
        self._ahead[:] = False
        self._ahead[rows] = True

    # ---- growing

    def rebase(self, row: int, base: int) -> None:
        """Forget what is kept of positions before ``base``."""
        shift = base - int(self.start[row])
        if shift > 0:
            for held in (self.choices[row], self.stated[row], *self.sampled.by_position(row)):
                held[:-shift] = held[shift:].copy()
        self.start[row] = base
        self._force_none(row)

    def restart(self, row: int, base: int, computed: int) -> None:
        """Make a row begin at ``base``, with ``computed`` positions of its text computed."""
        self.start[row] = base
        self.computed[row] = computed
        self.pending[row] = False
        self.sampled.forget(row)
        self._force_none(row)

    def force(self, row: int, kept: int, tokens: list[int], cut: bool) -> None:
        """Have a trunk go on with tokens that it did not choose.

        Args:
            row: the trunk; nothing has been forked off it after its first ``kept`` tokens.
            kept: how many of its tokens stay.
            tokens: the tokens it grows by after them.
            cut: whether it has more tokens than ``kept``; :meth:`resume` comes next then.
        """
        self._force_none(row)
        self._forced.add(row)
        self.forced[row, kept : kept + len(tokens)] = tokens
        if cut:
            # All tokens but a row's last one have been fed, so the choices after these are known.
            self.computed[row] = self.start[row] + kept
            self.pending[row] = False
            self.sampled.forget(row)

    def _force_none(self, row: int) -> None:
        if row in self._forced:
            self._forced.discard(row)
            self.forced[row] = -1

    def forced_at(self, rows: Int32Array, at: Int32Array) -> Int32Array | None:
        """``[n]``: the tokens forced on rows at an index of each; -1 for none. None: on no row."""
        return self.forced[rows, at] if self._forced else None

    def forced_after(self, rows: Int32Array) -> Int32Array | None:
        """The same after the token that each of them is feeding."""
        return self.forced_at(rows, self.computed[rows] + 1 - self.start[rows])

    def resume(self, rows: Int32Array, lengths: Int32Array) -> Grown:
        """Let idle rows grow again, as far as they have room.

        Args:
            rows: ``[n]``.
            lengths: ``[n]``, how many tokens each has.

        Returns:
            Those that grow at once, because their choices are known already.
        """
        # The others were stopped before they fed their last token.
        fed = self.computed[rows] >= self.start[rows] + lengths
        self.pending[rows[~fed]] = True
        grows = fed & (self.room[rows] > 0)
        rows, lengths = rows[grows], lengths[grows]
        firsts, forced = self.choices[rows, lengths, 0], self.forced_at(rows, lengths)
        kept = self.sampled.resume(rows, lengths, self.start[rows] + lengths, firsts, forced)
        return self._grow(rows, lengths, kept, forced)

    def take_step(
        self, rows: Int32Array, choices: Choices, sampling: Sampling | None = None
    ) -> Grown:
        """Take in one step's result.

        Args:
            rows: ``[n]``, the rows whose token at position ``computed`` was fed.
            choices: after each of these tokens.
            sampling: how the step chose their next tokens.
        """
        self.computed[rows] += 1
        self.pending[rows] = False
        at = self.computed[rows] - self.start[rows]
        self.choices[rows, at] = choices.tokens[:, : self.choices.shape[2]]
        self.stated[rows, at] = choices.probabilities
        grows = self.room[rows] > 0
        forced = self.forced_at(rows, at)
        drawn = self.sampled.take_step(rows, at, choices, sampling, grows, forced)
        of_grown = None if forced is None else forced[grows]
        return self._grow(rows[grows], at[grows], drawn, of_grown)

    def _grow(
        self, rows: Int32Array, at: Int32Array, drawn: Drawn, forced: Int32Array | None
    ) -> Grown:
        """Rows grow by what was drawn for their index ``at``, or by what is forced on them."""
        tokens, stated = drawn.tokens, self.stated[rows, at, 0]
        if forced is not None:
            named = (self.choices[rows, at] == tokens[:, None]) & (forced >= 0)[:, None]
            of_forced = np.where(named, self.stated[rows, at], 0.0).sum(axis=1, dtype=np.float32)
            stated = np.where(forced >= 0, of_forced, stated)
        self.room[rows] -= 1
        self.feed_token[rows] = tokens
        # A token that was sampled is never an end token.
        ended = (tokens[:, None] == self.stop[rows]).any(axis=1)
        self.pending[rows] = ~ended
        return Grown(rows, tokens, ended, stated, self.sampled.setting[rows], *drawn[1:])
