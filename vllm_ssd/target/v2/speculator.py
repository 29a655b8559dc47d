"""The speculator, which vLLM's V2 runner calls for drafts right after sampling."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_ssd.core.stats import Stats
from vllm_ssd.target.v2.device_sources import Sampled
from vllm_ssd.target.v2.draft_thread import DraftThread
from vllm_ssd.target.v2.outcomes import OutcomeReadback
from vllm_ssd.target.v2.proposals import Proposals
from vllm_ssd.target.v2.sampled_drafts import SampledDrafts
from vllm_ssd.target.v2.slots import Slots

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch


logger = logging.getLogger("vllm.vllm_ssd")


class Drafts(NamedTuple):
    """What the rank that has the draft looks up in, and tells."""

    proposals: Proposals
    slots: Slots
    readback: OutcomeReadback
    thread: DraftThread
    trimmed: Callable[[list[tuple[int, int]]], object]
    """Takes proposals that the scheduler cut (:meth:`.follower.Follower.trimmed`), after the
    outcomes they came with."""


class SSDSpeculator(BaseSpeculator):
    """Takes the place of the speculator that vLLM has built (``gpu/spec_decode/speculator.py``).

    Nothing in it waits, and nothing reads a value from the device.

    Args:
        depth: K.
        req_states: the runner's ``RequestState``.
        stats: counters to keep.
        drafts: the draft; ``None`` on other tensor-parallel ranks than the first.
        group: the tensor-parallel ranks, if there are several: all take the first one's drafts.
        sampling: of sampled drafts; ``None`` if all are certain.
    """

    supports_mm_inputs = False

    def __init__(
        self,
        depth: int,
        req_states: Any,
        stats: Stats,
        drafts: Drafts | None,
        group: Any = None,
        sampling: SampledDrafts | None = None,
    ) -> None:
        self.serving = False
        """Until vLLM has warmed up, the requests are its own: nobody is told of them."""
        self._req_states = req_states
        self._stats = stats
        self._drafts = drafts
        self._group = group
        self._depth = depth
        self._sampling = sampling

    @property
    def draft_logits(self) -> torch.Tensor | None:
        """What proposals were sampled from, for vLLM's sampler; ``None``: they are certain."""
        return None if self._sampling is None else self._sampling.logits

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Graphs will be captured: those of vLLM's memory profile go. None is a draft model's."""
        if self._drafts is not None:
            self._drafts.proposals.forget_graphs()

    def capture(self) -> None:
        """Capture the look-up, which works without a graph as well."""
        draft = self._drafts
        if draft is None:
            return
        try:
            with torch.inference_mode():
                draft.proposals.capture()
        except Exception as error:  # no error of the plugin may stop the engine
            logger.warning("ssd: no CUDA graphs of the look-up: %s", error)
            draft.thread.report(error)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Look up what follows each request's new tokens.

        Returns:
            ``[B, K]`` int64. Where fewer were found, the last token of the text fills up: the
            runner takes K for each request, and none that is not in the vocabulary.
        """
        began = time.perf_counter()
        if dummy_run:  # its slots mean nothing
            return self._zeros(input_batch)
        draft, drafts = self._drafts, None
        sampled: Sampled | None = None
        if draft is not None:
            try:
                drafts, sampled = self._propose(draft, input_batch, num_sampled, num_rejected)
            except Exception as error:  # no error of the plugin may stop the engine
                draft.thread.report(error)
        if drafts is None:
            drafts = self._zeros(input_batch)
        if self._group is not None:
            drafts = self._group.broadcast(drafts.contiguous(), src=0)
        if self._sampling is not None and self._sampling.wanted:
            self._hand_over(self._sampling, input_batch, drafts, sampled, temperature)
        if draft is not None:
            draft.thread.check()  # after the broadcast, for which the other ranks wait
        if self.serving:
            self._stats.proposals += 1
            self._stats.propose_seconds += time.perf_counter() - began
        return drafts

    def _propose(
        self,
        draft: Drafts,
        batch: InputBatch,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
    ) -> tuple[torch.Tensor, Sampled | None]:
        count = batch.num_reqs
        proposed = draft.proposals.compute(
            batch.idx_mapping[:count],
            num_sampled[:count],
            num_rejected[:count],
            self._sampling is not None and self._sampling.wanted,
        )
        if self.serving:
            serials = draft.slots.serials(batch.idx_mapping_np[:count])
            draft.readback.start(serials, proposed.outcome)
        return proposed.drafts, proposed.sampled

    def _hand_over(
        self,
        sampling: SampledDrafts,
        batch: InputBatch,
        drafts: torch.Tensor,
        sampled: Sampled | None,
        temperature: torch.Tensor,
    ) -> None:
        slots = batch.idx_mapping[: batch.num_reqs]
        try:
            sampling.hand_over(slots, drafts, sampled, temperature)
        except Exception as error:
            self._sampling_failed(error)

    def _sampling_failed(self, error: Exception) -> None:
        """From now on all is verified as certain, which is exact whatever drafts were sampled from.

        Raises:
            Exception: there are other ranks, which would verify otherwise. On the first one vLLM
                takes it for the step's.
            SystemExit: the same on another rank, of which vLLM would only log an exception
                (``WorkerProc.worker_busy_loop``); that it is gone ends the engine.
        """
        if self._group is not None:
            if self._drafts is not None:
                raise error
            logger.critical("ssd: a rank cannot verify as the first one does", exc_info=error)
            raise SystemExit(1) from error
        self._sampling = None
        if self._drafts is not None:
            self._drafts.thread.report(error)

    def _zeros(self, batch: InputBatch) -> torch.Tensor:
        """In place of proposals, where there are none."""
        shape, device = (batch.num_reqs, self._depth), self._req_states.device
        return torch.zeros(shape, dtype=torch.int64, device=device)

    def scheduled(self, step: SchedulerOutput, slots: dict[str, int]) -> None:
        """A step begins; its finished requests have left their slots, its new ones have some.

        Errors are raised by :meth:`propose`, if at all: the other ranks wait for this one.

        Args:
            step: vLLM's.
            slots: the runner's, by request id.
        """
        if not self.serving:
            return
        if self._sampling is not None:
            try:
                self._sampling.scheduled(step, slots)
            except Exception as error:  # no error of the plugin may stop the engine
                self._sampling_failed(error)
        draft = self._drafts
        if draft is None:
            return
        began = time.perf_counter()
        gone = step.finished_req_ids | (step.preempted_req_ids or set())
        new: list[NewRequestData] = step.scheduled_new_reqs
        try:
            draft.slots.free(gone)
            draft.slots.fill(new, slots)
            self._tell_of_cuts(draft, step)
        except Exception as error:  # as above
            draft.thread.report(error)
        self._stats.notices += 1
        self._stats.notice_seconds += time.perf_counter() - began

    def _tell_of_cuts(self, draft: Drafts, step: SchedulerOutput) -> None:
        """Requests of this step of which less than what was proposed is verified.

        What a grammar cuts is known by now without asynchronous scheduling only.
        """
        drafts = step.scheduled_spec_decode_tokens
        counts = [(req_id, len(drafts.get(req_id, ()))) for req_id in step.num_scheduled_tokens]
        cut = [(draft.slots.serial(each), count) for each, count in counts if count < self._depth]
        if cut:
            draft.readback.then(lambda: draft.trimmed(cut))


class Announcing:
    """Mixed into the runner's class: sees request slots given and taken."""

    speculator: Any
    req_states: Any

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Called once a step, after ``finish_requests``, before the forward."""
        super().add_requests(scheduler_output)  # type: ignore[misc]
        if isinstance(self.speculator, SSDSpeculator):
            self.speculator.scheduled(scheduler_output, self.req_states.req_id_to_index)


def take_over(their: Any, speculator: SSDSpeculator) -> None:
    """Put ours in the place of the speculator that their runner has built, before it is used."""
    their.speculator = speculator
    their.__class__ = type("SSDModelRunner", (Announcing, type(their)), {})
