"""What the draft's next step computes: which rows decode, which prompts are prefilled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vllm_ssd.core.arrays import BoolArray, Int32Array
from vllm_ssd.draft.allocator import Allocator
from vllm_ssd.draft.model import FROM_LAST_STEP, Sequences
from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.share import Share

Chunks = list[tuple[Request, int]]
"""Prompts, and how many of their tokens a step prefills."""


class StepPlan:
    """Chooses, and prepares the forward's input.

    Args:
        allocator: the requests and what they hold.
        prefill_chunk: most prompt tokens per step while other requests decode.
        prefill_chunk_idle: the same while none does.
    """

    def __init__(self, allocator: Allocator, prefill_chunk: int, prefill_chunk_idle: int) -> None:
        self._allocator = allocator
        self._rows = allocator.rows
        self._prefill_chunk = prefill_chunk
        self._prefill_chunk_idle = prefill_chunk_idle

    def due(self, pending: BoolArray) -> Int32Array:
        """The rows to decode: of those pending, of a target that waits only what it waits for."""
        due = pending
        for share in self._allocator.shares:
            if share.awaited:
                first = np.zeros_like(pending)
                first[_awaited_trunks(share)] = True
                first &= pending
                if first.any() or self._awaited_prompts(share):
                    due = due & (first | (self._rows.owner != share.index))
        return np.flatnonzero(due).astype(np.int32)

    def _awaited_prompts(self, share: Share) -> list[Request]:
        awaited = share.awaited.values()
        return [request for request in awaited if request in self._allocator.catching_up]

    def chunks(self, decoding: int) -> Chunks:
        """Which requests catch up with their text in this step, and by how many tokens.

        Args:
            decoding: rows that decode in it.
        """
        if not self._allocator.catching_up:
            return []
        waiting = list(self._allocator.catching_up)
        for share in self._allocator.shares:
            if share.awaited:
                first = self._awaited_prompts(share)
                if first or self._rows.pending[_awaited_trunks(share)].any():
                    waiting = [one for one in waiting if one.share is not share or one in first]
        for request in waiting:
            self._allocator.reuse_prefix(request)
        missing = [request.length - int(self._rows.computed[request.trunk]) for request in waiting]
        budget = self._prefill_chunk if decoding else self._prefill_chunk_idle
        counts = chunk_sizes(missing, budget)
        chunks = [pair for pair in zip(waiting, counts, strict=True) if pair[1]]
        # A chunk of one token is a decode to the model, and decodes come first.
        chunks.sort(key=lambda chunk: chunk[1] > 1)
        return chunks

    def sequences(
        self,
        decoding: Int32Array,
        chunks: Chunks,
        grows: NDArray[np.bool_] | None,
    ) -> Sequences:
        """The forward's input: the decoding rows, then the chunks.

        Args:
            decoding: ``[n]``, the rows that feed one token.
            chunks: prompts and how many of their tokens.
            grows: ``[n]``, which of the rows the step under way grows by a token; None if no
                step is under way.
        """
        rows = self._rows
        tokens, positions = rows.feed_token[decoding], rows.computed[decoding]
        if grows is not None:
            # Without a token forced on it a row feeds what the step under way chooses.
            after = rows.forced_after(decoding[grows])
            if after is None:
                tokens[grows] = FROM_LAST_STEP
            else:
                tokens[grows] = np.where(after >= 0, after, FROM_LAST_STEP)
            positions += grows
        if not chunks:
            sampling = rows.sampled.sampling(decoding, positions + 1, rows.stop)
            ones = np.ones(len(decoding), np.int32)
            return Sequences(decoding, ones, tokens, positions, sampling)
        all_tokens, all_positions = [tokens], [positions]
        for request, count in chunks:
            start = int(rows.computed[request.trunk])
            all_tokens.append(request.text[start : start + count])
            all_positions.append(np.arange(start, start + count, dtype=np.int32))
        counts = np.array([count for _, count in chunks], np.int32)
        trunks = np.array([request.trunk for request, _ in chunks], np.int32)
        all_rows = np.concatenate([decoding, trunks])
        next_positions = np.concatenate([positions + 1, rows.computed[trunks] + counts])
        return Sequences(
            all_rows,
            np.concatenate([np.ones(len(decoding), np.int32), counts]),
            np.concatenate(all_tokens),
            np.concatenate(all_positions),
            rows.sampled.sampling(all_rows, next_positions, rows.stop),
        )


def chunk_sizes(missing: list[int], budget: int) -> list[int]:
    """How many tokens each prompt gets of a step's budget.

    Half goes to the one that has waited longest, so that it completes; the rest to the shortest
    first, so that they do not wait for it.

    Args:
        missing: tokens each prompt still needs, at least 1; those that wait longest come first.
        budget: tokens, at least 1.
    """
    counts = [0] * len(missing)
    if missing:
        counts[0] = min(missing[0], (budget + 1) // 2)
    left = budget - sum(counts)
    for i in sorted(range(len(missing)), key=missing.__getitem__):
        more = min(missing[i] - counts[i], left)
        counts[i] += more
        left -= more
    return counts


def _awaited_trunks(share: Share) -> list[int]:
    return [request.trunk for request in share.awaited.values() if request.trunk != DORMANT]
