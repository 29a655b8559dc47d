"""What the draft's algorithm asks of a model: one forward over forkable sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from vllm_ssd.core.tree import Int32Array


class Sequences(NamedTuple):
    """What one forward computes: ``n`` sequences with ``T`` query tokens in all."""

    block_tables: Int32Array
    """``[n, blocks]``."""
    query_lens: Int32Array
    """``[n]``; sequences with one query token come first."""
    tokens: Int32Array
    """``[T]``."""
    positions: Int32Array
    """``[T]``."""


class DraftModel(Protocol):
    """A model whose sequences are block tables."""

    def forward(self, sequences: Sequences) -> Int32Array:
        """Write the KV of all query tokens and return ``[n, C]``: the best C next tokens of each
        sequence's last query token, best first, all below the target's vocabulary size."""

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy KV blocks, ordered before the next forward."""
