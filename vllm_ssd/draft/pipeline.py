"""The draft's steps, one launched ahead of the other where the model can.

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

from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.draft.allocator import Allocator
from vllm_ssd.draft.model import DraftModel, Sampling, Ticket
from vllm_ssd.draft.rows import Grown
from vllm_ssd.draft.share import Share
from vllm_ssd.draft.step_plan import Chunks, StepPlan


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
    chunks: Chunks
    ahead: bool
    """Launched while another one was under way."""
    began: float
    ticket: Ticket
    sampling: Sampling | None


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
        self._plan = StepPlan(allocator, prefill_chunk, prefill_chunk_idle)
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
        decoding = self._plan.due(self._rows.pending)
        chunks = self._plan.chunks(len(decoding))
        return self._submit(began, decoding, chunks, None)

    def _launch_after(self, step: _Step) -> _Step | None:
        """Launch a step of all rows that are certain to be pending after ``step``, if any is."""
        began = time.perf_counter()
        rows, before = self._rows, step.decoding
        pending = rows.pending.copy()
        pending[before] &= rows.room[before] > 0
        decoding = self._plan.due(pending)
        if not len(decoding):
            return None
        grows = np.zeros(len(pending), np.bool_)
        grows[before] = True
        return self._submit(began, decoding, [], grows[decoding])

    def _submit(
        self,
        began: float,
        decoding: Int32Array,
        chunks: Chunks,
        grows: NDArray[np.bool_] | None,
    ) -> _Step:
        sequences = self._plan.sequences(decoding, chunks, grows)
        launched = time.perf_counter()
        ticket = self._model.launch(self._allocator.take_changes(), sequences)
        self.model_seconds += time.perf_counter() - launched
        return _Step(decoding, chunks, grows is not None, began, ticket, sequences.sampling)

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
