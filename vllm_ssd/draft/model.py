"""The interface of a draft model: forwards over forkable sequences."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from vllm_ssd.core.arrays import BoolArray, Float32Array, Int32Array, Int64Array

FROM_LAST_STEP = -1
"""In place of a token: the next token that the step before chose for the same row."""


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


class Sampling(NamedTuple):
    """How the next tokens of ``n`` texts are chosen; one entry for each sequence."""

    sampled: BoolArray
    """``[n]``, whether its next token is sampled from q'; else it is the first choice, certain."""
    temperature: Float32Array
    """``[n]``; 0: a greedy request."""
    top_k: Int32Array
    """``[n]``, of so many best tokens; 0: no such bound."""
    top_p: Float32Array
    """``[n]``, of the best tokens that have this probability together; 1: no such bound."""
    ends: Int32Array
    """``[n, stop tokens]``, tokens that are never sampled, padded with -1."""
    weighed: Int32Array
    """``[n]``: so many of the best tokens, end tokens not counted, are weighed by ..."""
    weight: Float32Array
    """``[n]``, ... C of arXiv 2603.03251, Definition 14."""

    def of(self, at: Int64Array) -> Sampling:
        """That of some texts."""
        return Sampling._make(values[at] for values in self)


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
    sampling: Sampling | None = None
    """None: all requests are greedy."""


class Choices(NamedTuple):
    """The best next tokens after ``n`` texts, and the one that each goes on with."""

    tokens: Int32Array
    """``[n, C]``, best first, all below the target's vocabulary size; ``[n, max(C, N)]`` if any is
    sampled."""
    probabilities: Float32Array
    """``[n, C]``, their shares of the probability that the C have together, at the request's
    temperature, top-k and top-p (greedy: at 1.0, of all): they sum to 1."""
    next_tokens: Int32Array
    """``[n]``, what each text goes on with: the first choice, or a sample."""
    proposals: Float32Array | None = None
    """``[n, N]``: q', the probabilities with which the first N of ``tokens`` were sampled, in
    float32 as used; one-hot where the first choice was taken. None if nothing was sampled."""

    @classmethod
    def firsts(cls, tokens: Int32Array, probabilities: Float32Array) -> Choices:
        """Choices of which the first is taken everywhere."""
        return cls(tokens, probabilities, np.ascontiguousarray(tokens[:, 0]))

    def of(self, at: Int64Array) -> Choices:
        """Those of some texts."""
        proposals = None if self.proposals is None else self.proposals[at]
        return Choices(self.tokens[at], self.probabilities[at], self.next_tokens[at], proposals)


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
    graph_steps: int
    """Forwards so far that replayed one CUDA graph, attention included; 0 on CPU."""

    def launch(self, changes: BlockChanges, sequences: Sequences) -> Ticket:
        """Copy blocks and update tables, write the KV of all query tokens and choose the best next
        tokens; everything in launch order."""
