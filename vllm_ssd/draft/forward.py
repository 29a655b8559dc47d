"""What the draft's algorithm asks of a model: forwards over forkable sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from vllm_ssd.core.outcomes import Float32Array
from vllm_ssd.core.tree import Int32Array

FROM_LAST_STEP = -1
"""In place of a token: the first choice the step before made for the same row."""


class Sequences(NamedTuple):
    """What one forward computes: ``n`` sequences with ``T`` query tokens in all."""

    block_tables: Int32Array
    """``[n, blocks]``."""
    query_lens: Int32Array
    """``[n]``; sequences with one query token come first."""
    tokens: Int32Array
    """``[T]``; :data:`FROM_LAST_STEP` only in a forward without prompts, of a model that looks
    ahead."""
    positions: Int32Array
    """``[T]``."""
    rows: Int32Array
    """``[n]``, the row of each sequence."""


class Choices(NamedTuple):
    """What a model would go on with after ``n`` texts."""

    tokens: Int32Array
    """``[n, C]``, the best C next tokens, best first, all below the target's vocabulary size."""
    confidence: Float32Array
    """``[n]``, the first one's share of the probability that the C have together."""


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
    """A model whose sequences are block tables."""

    lookahead: bool
    """Whether a forward may be launched before the result of the one before it is taken; if not,
    launching computes."""

    def launch(self, sequences: Sequences) -> Ticket:
        """Write the KV of all query tokens and choose the best next tokens, in launch order."""

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy KV blocks, after the forwards launched before and before those launched later."""
