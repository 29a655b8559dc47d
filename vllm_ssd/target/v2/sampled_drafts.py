"""Sampled drafts on V2: which slots sample, and what their proposals were sampled from.

On every tensor-parallel rank, since each samples for itself: the rank that has the draft sends what
it found to the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_ssd.target.v2.device_sources import Sampled, certain
from vllm_ssd.target.v2.draft_logits import DraftLogits

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput


class SampledDrafts:
    """Keeps vLLM's ``draft_logits`` true to what the slots propose, while any of them samples.

    Args:
        rows: the logits.
        req_states: the runner's ``RequestState``.
        group: the tensor-parallel ranks, if there are several.
    """

    def __init__(self, rows: DraftLogits, req_states: Any, group: Any = None) -> None:
        self._rows = rows
        self._req_states = req_states
        self._group = group
        self._slots: dict[str, int] = {}
        """Of requests with a temperature, by vLLM's id; the same on all ranks."""

    @property
    def logits(self) -> torch.Tensor:
        """``[slots, K, vocabulary]``, as vLLM's sampler takes them."""
        return self._rows.logits

    @property
    def wanted(self) -> bool:
        """Whether a request samples. If none does, the sampler does not look at the logits."""
        return bool(self._slots)

    @torch.inference_mode()
    def scheduled(self, step: SchedulerOutput, slots: dict[str, int]) -> None:
        """A step begins.

        Args:
            step: vLLM's.
            slots: the runner's, by request id.
        """
        new: list[NewRequestData] = step.scheduled_new_reqs
        gone = step.finished_req_ids | (step.preempted_req_ids or set())
        for req_id in (*gone, *(each.req_id for each in new)):
            self._slots.pop(req_id, None)
        begun = {
            each.req_id: slots[each.req_id]
            for each in new
            if each.sampling_params is not None and each.sampling_params.temperature > 0.0
        }
        self._slots |= begun
        if begun:
            at = np.array(list(begun.values()), np.int64)
            on_device = async_tensor_h2d(at, device=self._req_states.device)
            self._rows.begin(on_device, self._req_states.draft_tokens)

    def hand_over(
        self,
        slots: torch.Tensor,
        drafts: torch.Tensor,
        sampled: Sampled | None,
        temperature: torch.Tensor,
    ) -> None:
        """The slots of a batch propose other tokens.

        Args:
            slots: ``[B]`` int64.
            drafts: ``[B, K]`` int64.
            sampled: what they were sampled from, on the rank that knows it; None: from nothing.
            temperature: ``[slots]``.
        """
        if sampled is None:
            sampled = certain(drafts, self._rows.most)
        if self._group is not None:
            tokens = self._group.broadcast(sampled.tokens.contiguous(), src=0)
            logs = self._group.broadcast(sampled.logs.contiguous(), src=0)
            sampled = sampled._replace(tokens=tokens, logs=logs)
        self._rows.write(slots, sampled, temperature)
