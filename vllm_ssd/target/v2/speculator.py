"""The speculator, which vLLM's V2 runner calls for drafts right after sampling."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_ssd.core.stats import Stats
from vllm_ssd.target.v2.draft_thread import DraftThread
from vllm_ssd.target.v2.outcomes import OutcomeReadback
from vllm_ssd.target.v2.proposals import Proposals
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


class SSDSpeculator(BaseSpeculator):
    """Takes the place of the speculator that vLLM has built (``gpu/spec_decode/speculator.py``).

    Nothing in it waits, and nothing reads a value from the device.

    Args:
        depth: K.
        req_states: the runner's ``RequestState``.
        stats: counters to keep.
        drafts: the draft; ``None`` on other tensor-parallel ranks than the first.
        group: the tensor-parallel ranks, if there are several: all take the first one's drafts.
        strict: raise errors of the plugin.
    """

    supports_mm_inputs = False
    draft_logits = None
    """Proposals are verified as certain."""

    def __init__(
        self,
        depth: int,
        req_states: Any,
        stats: Stats,
        drafts: Drafts | None,
        group: Any = None,
        strict: bool = False,
    ) -> None:
        self._req_states = req_states
        self._stats = stats
        self._drafts = drafts
        self._group = group
        self._strict = strict
        self._complained = False
        self._depth = depth

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing of vLLM's is captured: the draft model is elsewhere."""

    def capture(self) -> None:
        """Capture the look-up."""
        if self._drafts is not None:
            with torch.inference_mode():
                self._drafts.proposals.capture()

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
        drafts: torch.Tensor | None = None
        if self._drafts is not None:
            try:
                drafts = self._propose(self._drafts, input_batch, num_sampled, num_rejected)
            except Exception as error:  # no error of the plugin may stop the engine
                self._degrade(error)
        if drafts is None:
            drafts = self._zeros(input_batch)
        if self._group is not None:
            drafts = self._group.broadcast(drafts.contiguous(), src=0)
        self._stats.proposals += 1
        self._stats.propose_seconds += time.perf_counter() - began
        return drafts

    def _propose(
        self,
        draft: Drafts,
        batch: InputBatch,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
    ) -> torch.Tensor:
        draft.thread.check()
        count = batch.num_reqs
        proposed = draft.proposals.compute(
            batch.idx_mapping[:count], num_sampled[:count], num_rejected[:count]
        )
        draft.readback.start(draft.slots.serials(batch.idx_mapping_np[:count]), proposed.outcome)
        return proposed.drafts

    def _zeros(self, batch: InputBatch) -> torch.Tensor:
        """In place of proposals, where there are none."""
        shape, device = (batch.num_reqs, self._depth), self._req_states.device
        return torch.zeros(shape, dtype=torch.int64, device=device)

    def scheduled(self, step: SchedulerOutput, slots: dict[str, int]) -> None:
        """A step begins; its finished requests have left their slots, its new ones have some.

        Args:
            step: vLLM's.
            slots: the runner's, by request id.
        """
        if self._drafts is None:
            return
        began = time.perf_counter()
        gone = step.finished_req_ids | (step.preempted_req_ids or set())
        new: list[NewRequestData] = step.scheduled_new_reqs
        try:
            self._drafts.slots.free(gone)
            self._drafts.slots.fill(new, slots)
        except Exception as error:  # as above
            self._degrade(error)
        self._stats.notices += 1
        self._stats.notice_seconds += time.perf_counter() - began

    def _degrade(self, error: Exception) -> None:
        """Go on without drafts after an error of ours; one log line, not one a step."""
        if self._strict:
            raise error
        self._stats.errors += 1
        if not self._complained:
            self._complained = True
            logger.exception("ssd: error in the plugin; decoding goes on plainly")


class Announcing:
    """Mixed into the runner's class: sees request slots given and taken."""

    speculator: Any
    req_states: Any

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Called once a step, after ``finish_requests``, before the forward."""
        super().add_requests(scheduler_output)  # type: ignore[misc]
        if isinstance(self.speculator, SSDSpeculator):
            self.speculator.scheduled(scheduler_output, self.req_states.req_id_to_index)


def take_over(runner: Any, speculator: SSDSpeculator) -> None:
    """Put ours in the place of the speculator that vLLM's runner has built, before it is used."""
    runner.speculator = speculator
    runner.__class__ = type("SSDModelRunner", (Announcing, type(runner)), {})
