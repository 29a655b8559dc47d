"""The dense q' that vLLM's rejection sampler takes on V2, one row for each slot and column.

``[slots, K, vocabulary]``, as logits before temperature: the sampler divides by it. A request's
rows are those of the proposal that its slot holds (``RequestState.draft_tokens``), whatever that is
from, and have to change with it: in every step in which a slot is proposed for, and when it gets
another request, for which vLLM puts zeros there.
"""

from __future__ import annotations

import torch

from vllm_ssd.target.v2.device_sources import Sampled, certain

LARGEST_BYTES = 1 << 30
"""Of the rows: with K = 6 enough for 341 slots at a vocabulary of 131,072 tokens. Where they would
be larger, drafts are the first choices, which need none."""


class DraftLogits:
    """The rows, on every tensor-parallel rank.

    Args:
        slots: of the runner.
        depth: K.
        vocab_size: the target's.
        most: N, tokens of a distribution.
        device: of the runner.
    """

    def __init__(
        self, slots: int, depth: int, vocab_size: int, most: int, device: torch.device
    ) -> None:
        self.most = most
        shape = slots, depth, vocab_size
        self.logits = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
        self.logits[:, :, 0] = 0.0  # a slot proposes zeros at first
        self._flat = self.logits.view(-1)
        columns = torch.arange(slots * depth, device=device).view(slots, depth, 1)
        self._begins = columns * vocab_size
        """``[slots, K, 1]``, where each row begins in the memory."""
        self._held = self._begins.repeat(1, 1, most)
        """``[slots, K, N]``, where something is above 0."""

    def write(self, slots: torch.Tensor, sampled: Sampled, temperature: torch.Tensor) -> None:
        """Replace the rows of B slots.

        Args:
            slots: ``[B]`` int64, different ones.
            sampled: what their proposals were sampled from.
            temperature: ``[slots]``.
        """
        places = self._begins[slots] + sampled.tokens
        logits = sampled.logs * temperature[slots][:, None, None]
        self._flat.index_fill_(0, self._held[slots].view(-1), -torch.inf)
        self._flat.index_copy_(0, places.view(-1), logits.view(-1))
        self._held[slots] = places

    def begin(self, slots: torch.Tensor, drafts: torch.Tensor) -> None:
        """New requests are in B slots.

        Args:
            slots: ``[B]`` int64.
            drafts: ``[slots, K]``, what vLLM takes for their proposals; -1 is always rejected.
        """
        none = torch.zeros(len(self.logits), device=self.logits.device)
        self.write(slots, certain(drafts[slots].clamp(min=0), self.most), none)
