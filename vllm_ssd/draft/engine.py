"""The draft's engine: decodes the branches of all requests in one batch, step by step.

It is shared by its targets (:mod:`vllm_ssd.draft.session`): one model, one pool of rows and KV
blocks, one prefix cache. All rows are decoded together, one token a step, and what a step has found
is given to the sessions of the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vllm_ssd.core.arrays import Float32Array
from vllm_ssd.core.budget import StepTimeModel
from vllm_ssd.draft.allocator import Allocator
from vllm_ssd.draft.blocks import KVBlocks
from vllm_ssd.draft.forking import Policy
from vllm_ssd.draft.model import DraftModel
from vllm_ssd.draft.pipeline import Pipeline, Taken
from vllm_ssd.draft.rows import Rows
from vllm_ssd.draft.session import Session, StepError
from vllm_ssd.draft.share import Share
from vllm_ssd.draft.tally import StepTally


class DraftEngine:
    """One draft model, and the targets it drafts for.

    Args:
        model: the draft model.
        rows: the rows of its batch.
        blocks: the blocks of its KV cache.
        prefill_chunk: most prompt tokens per step while other requests decode.
        prefill_chunk_idle: the same while none does.
        interrupted: whether a message from a target waits for the step under way.
    """

    def __init__(
        self,
        model: DraftModel,
        rows: Rows,
        blocks: KVBlocks,
        prefill_chunk: int,
        prefill_chunk_idle: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model
        self.allocator = Allocator(rows, blocks)
        self.step_times = StepTimeModel()
        self.sessions: list[Session] = []
        self._rows = rows
        self._tally = StepTally()
        self._pipeline = Pipeline(
            model, self.allocator, prefill_chunk, prefill_chunk_idle, interrupted
        )

    @property
    def max_rows(self) -> int:
        """Rows of the batch."""
        return len(self._rows.start)

    # ---- targets

    def open(self, policy: Policy) -> Session:
        """A new target.

        Args:
            policy: which outcomes are guessed; its K is not larger than that of the rows.
        """
        taken = {session.share.index for session in self.sessions}
        index = min(set(range(len(taken) + 1)) - taken)
        session = Session(self, index, policy)
        self.sessions.append(session)
        self.allocator.shares.append(session.share)
        return session

    def close(self, session: Session) -> None:
        """Free all that a target holds."""
        session.reset()
        self.sessions.remove(session)
        self.allocator.shares.remove(session.share)

    # ---- steps

    @property
    def counters(self) -> dict[str, float]:
        """Of its steps since the start."""
        return self._tally.counters

    def gauges(self) -> dict[str, float]:
        """What is in use now; may be called by another thread."""
        blocks = self.allocator.blocks
        return {
            "draft_rows_used": float(self.max_rows - self._rows.free_count),
            "draft_kv_cache_usage_perc": 1.0 - blocks.free_count / max(1, blocks.count),
        }

    @property
    def steps(self) -> int:
        """How many there were."""
        return self._tally.steps.count

    def step_seconds_since(self, steps: int) -> Float32Array:
        """The times of those after the first ``steps``, as far as they are kept."""
        return np.array(self._tally.steps.since(steps), np.float32)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something, or one is under way."""
        return self._pipeline.has_work

    def has_work_for(self, share: Share) -> bool:
        """The same for one target."""
        return self._pipeline.has_work_for(share)

    def step(self) -> None:
        """Decode every pending row by one token, prefill some, fork where choices became known.

        What is to be published is in :meth:`Session.publications` then.
        """
        self._pipeline.launch()
        # Where launches compute, learning would keep a target waiting.
        if not any(session.share.awaited for session in self.sessions):
            for session in self.sessions:
                session.learn()
        self._follow_up(self._pipeline.take())

    def settle(self) -> None:
        """Finish the step in flight before a message modifies its rows.

        Raises:
            StepError: that step failed.
        """
        try:
            taken = self._pipeline.settle()
            if taken is not None:
                self._follow_up(taken)
        except Exception as error:  # whatever it is, it concerns all targets
            raise StepError(f"{type(error).__name__}: {error}") from error

    def abandon(self) -> None:
        """Drop the steps in flight; they are computed again."""
        self._pipeline.abandon()

    def _follow_up(self, taken: Taken) -> None:
        """Give the sessions what a step has found."""
        if len(self.sessions) == 1:
            self.sessions[0].grow(taken.grown)
            self.sessions[0].observe_others(0)
        else:
            owners = self._rows.owner[taken.grown.rows]
            decoding = self._rows.owner[taken.decoding]
            for session in self.sessions:
                session.grow(taken.grown.of(owners == session.share.index))
                session.observe_others(int((decoding != session.share.index).sum()))
        # Forks may take rows of others: all that grew must be in the trees by now.
        for session in self.sessions:
            session.fork()
        seconds = self._tally.step(taken, self._pipeline.model_seconds, self.model.graph_steps)
        if not taken.prefilled:
            self.step_times.observe(len(taken.decoding), seconds)
        for session in self.sessions:
            session.end_idle_round()
