"""The interface of a draft model: forwards over forkable sequences."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from vllm_ssd.core.arrays import Float32Array, Int32Array

FROM_LAST_STEP = -1
"""In place of a token: the first choice the step before made for the same row."""


class BlockChanges(NamedTuple):
    """What has happened to the KV blocks since the forward before; applied in this order."""

    sources: Int32Array
    """``[c]``, blocks to copy ..."""
    destinations: Int32Array
    """``[c]``, ... to these, all different and none of them a source."""
    forks: Int32Array
    """``[f]``, rows, all different, whose block table begins as another row's does: all of these
    tables are read before one is written."""
    trunks: Int32Array
    """``[f]``, these other rows."""
    shared: int
    """How many entries are taken over, at most."""
    rows: Int32Array
    """``[m]``: single entries of block tables, each named once: the row, ..."""
    columns: Int32Array
    """``[m]``, ... which entry ..."""
    blocks: Int32Array
    """``[m]``, ... and the block."""

    @classmethod
    def of_tables(cls, rows: Int32Array, tables: Int32Array) -> BlockChanges:
        """Whole block tables, ``[n, blocks]``, of ``n`` rows, and no copies."""
        none = np.zeros(0, np.int32)
        count, width = tables.shape
        columns = np.tile(np.arange(width, dtype=np.int32), count)
        return cls(none, none, none, none, 0, np.repeat(rows, width), columns, tables.ravel())


class Sequences(NamedTuple):
    """What one forward computes: ``n`` sequences with ``T`` query tokens in all."""

    rows: Int32Array
    """``[n]``, the row of each sequence: its block table is the last one sent for that row."""
    query_lens: Int32Array
    """``[n]``; sequences with one query token come first."""
    tokens: Int32Array
    """``[T]``; :data:`FROM_LAST_STEP` only in a forward without prompts, of a model that looks
    ahead."""
    positions: Int32Array
    """``[T]``."""


class Choices(NamedTuple):
    """The best next tokens after ``n`` texts."""

    tokens: Int32Array
    """``[n, C]``, best first, all below the target's vocabulary size."""
    probabilities: Float32Array
    """``[n, C]``, their shares of the probability that the C have together: they sum to 1."""


class Ticket(Protocol):
    """A forward under way."""

    def result(self) -> Choices:
        """Wait for the choices after each sequence's last query token."""


class Done(NamedTuple):
    """A ticket for a forward that was computed when it was launched."""

    choices: Choices

    def result(self) -> Choices:
        """See :class:`Ticket`."""
        return self.choices


class DraftModel(Protocol):
    """A model whose sequences are rows of a block table that it keeps."""

    lookahead: bool
    """Whether a forward may be launched before the result of the one before it is taken; if not,
    ``launch`` itself computes."""

    def launch(self, changes: BlockChanges, sequences: Sequences) -> Ticket:
        """Copy blocks and update tables, write the KV of all query tokens and choose the best next
        tokens; everything in launch order."""
