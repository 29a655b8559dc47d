"""The draft's steps: what the next one computes, and launching it ahead where the model can.

With a model that looks ahead, a step is launched while the one before it is under way: the device
does not wait while the host reads a result, publishes it and makes forks. Such a step holds the
rows with room for one more token after the one before (they feed its token, taken from it on the
device), and the forks made by then. What it computes for a row that turns out to have ended is
dropped. Before a message changes the rows, :meth:`Pipeline.settle` finishes the step ahead; the row
of a fork that is given up meanwhile is free only once that step is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_ssd.core.arrays import BoolArray, Int32Array
from vllm_ssd.draft.allocator import Allocator
from vllm_ssd.draft.model import FROM_LAST_STEP, DraftModel, Sampling, Sequences, Ticket
from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.rows import Grown
from vllm_ssd.draft.share import Share


class Taken(NamedTuple):
    """The result of a step."""

    grown: Grown
    """The rows that grew, and by what."""
    decoding: Int32Array
    """The rows that were decoded."""
    prefilled: int
    """How many prompt tokens were prefilled."""
    began: float
    """When its launch began, by ``time.perf_counter``."""


class _Step(NamedTuple):
    """A step under way."""

    decoding: Int32Array
    chunks: list[tuple[Request, int]]
    ahead: bool
    """Launched while another one was under way."""
    began: float
    ticket: Ticket
    sampling: Sampling | None


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


class Pipeline:
    """Launches steps and takes their results into the rows.

    Args:
        model: the draft model.
        allocator: the requests and what they hold.
        prefill_chunk: most prompt tokens per step while other requests decode.
        prefill_chunk_idle: the same while none does.
        interrupted: whether a message from the target waits for the step under way.
    """

    def __init__(
        self,
        model: DraftModel,
        allocator: Allocator,
        prefill_chunk: int,
        prefill_chunk_idle: int,
        interrupted: Callable[[], bool],
    ) -> None:
        self.model_seconds = 0.0
        """Time spent in launches and in waiting for results."""
        self._model = model
        self._allocator = allocator
        self._rows = allocator.rows
        self._interrupted = interrupted
        self._prefill_chunk = prefill_chunk
        self._prefill_chunk_idle = prefill_chunk_idle
        self._under_way: _Step | None = None
        self._behind: _Step | None = None
        """Launched while the other one is under way; there is none before :meth:`launch`."""

    @property
    def has_work(self) -> bool:
        """Whether a step is under way or would compute something."""
        if self._under_way is not None or self._allocator.catching_up:
            return True
        return bool(self._rows.pending.any())

    def has_work_for(self, share: Share) -> bool:
        """The same for one target's rows and prompts."""
        step = self._under_way
        if step is not None:
            if (self._rows.owner[step.decoding] == share.index).any():
                return True
            if any(request.share is share for request, _ in step.chunks):
                return True
        if any(request.share is share for request in self._allocator.catching_up):
            return True
        return bool((self._rows.pending & (self._rows.owner == share.index)).any())

    def launch(self) -> None:
        """Launch a step, unless one is under way, and the one behind it where that is possible."""
        step = self._under_way = self._under_way or self._launch()
        # Nothing is launched beside chunks: their trunks join the rows with the result. Nor while
        # a message from the target waits, which would have to wait for that step as well.
        if self._model.lookahead and not step.chunks and not self._interrupted():
            self._behind = self._launch_after(step)

    def take(self) -> Taken:
        """Take in the step under way, after :meth:`launch`; the one behind it is next."""
        step, self._under_way, self._behind = self._under_way, self._behind, None
        assert step is not None
        taken = self._take(step)
        held = self._under_way.decoding if self._under_way else np.zeros(0, np.int32)
        self._rows.launched_ahead(held)
        return taken

    def abandon(self) -> None:
        """Drop the steps that are under way."""
        for step in (self._under_way, self._behind):
            if step is not None:
                step.ticket.result()
        self._under_way = self._behind = None

    def settle(self) -> Taken | None:
        """Take in the step that is under way, if one is; afterwards none is."""
        step, self._under_way = self._under_way, None
        if step is None:
            return None
        taken = self._take(step)
        self._rows.launched_ahead(np.zeros(0, np.int32))
        return taken

    # ---- launching

    def _launch(self) -> _Step:
        """Launch a step of all pending rows and of some prompts' tokens."""
        began = time.perf_counter()
        decoding = self._due(self._rows.pending)
        chunks = self._next_chunks(len(decoding))
        return self._submit(began, decoding, chunks, None)

    def _launch_after(self, step: _Step) -> _Step | None:
        """Launch a step of all rows that are certain to be pending after ``step``, if any is."""
        began = time.perf_counter()
        rows, before = self._rows, step.decoding
        pending = rows.pending.copy()
        pending[before] &= rows.room[before] > 0
        decoding = self._due(pending)
        if not len(decoding):
            return None
        grows = np.zeros(len(pending), np.bool_)
        grows[before] = True
        return self._submit(began, decoding, [], grows[decoding])

    def _due(self, pending: BoolArray) -> Int32Array:
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

    def _submit(
        self,
        began: float,
        decoding: Int32Array,
        chunks: list[tuple[Request, int]],
        grows: NDArray[np.bool_] | None,
    ) -> _Step:
        sequences = self._sequences(decoding, chunks, grows)
        launched = time.perf_counter()
        ticket = self._model.launch(self._allocator.take_changes(), sequences)
        self.model_seconds += time.perf_counter() - launched
        return _Step(decoding, chunks, grows is not None, began, ticket, sequences.sampling)

    def _next_chunks(self, decoding: int) -> list[tuple[Request, int]]:
        """Which requests catch up with their text in this step, and by how many tokens."""
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

    def _sequences(
        self,
        decoding: Int32Array,
        chunks: list[tuple[Request, int]],
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

    # ---- taking in

    def _take(self, step: _Step) -> Taken:
        """Wait for a step; grow the rows that decoded and the trunks that have caught up."""
        waiting = time.perf_counter()
        choices = step.ticket.result()
        self.model_seconds += time.perf_counter() - waiting
        decoding, rows = step.decoding, self._rows
        fed, at = decoding, np.arange(len(decoding))
        if step.ahead:
            # Some may have ended in the step before; nothing else has changed since the launch.
            still = rows.pending[decoding]
            fed, at = fed[still], at[still]
        caught_up, their_at = [], []
        for i, (request, count) in enumerate(step.chunks, start=len(decoding)):
            rows.computed[request.trunk] += count
            self._allocator.share_verified(request)
            if int(rows.computed[request.trunk]) == request.length:
                del self._allocator.catching_up[request]
                # As if it had only fed its last token, like every row that decodes.
                rows.computed[request.trunk] -= 1
                caught_up.append(request.trunk)
                their_at.append(i)
        if caught_up:
            fed = np.concatenate([fed, np.array(caught_up, np.int32)])
            at = np.concatenate([at, their_at])
        sampling = step.sampling
        if step.ahead or step.chunks:
            choices = choices.of(at)
            sampling = None if sampling is None else sampling.of(at)
        grown = rows.take_step(fed, choices, sampling)
        prefilled = sum(count for _, count in step.chunks)
        return Taken(grown, decoding, prefilled, step.began)
