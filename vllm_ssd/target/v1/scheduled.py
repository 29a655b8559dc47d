"""Steps and requests of vLLM's V1 model runner in plain types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_ssd.target.requests import can_draft
from vllm_ssd.target.steps import Decodes, EngineRequest, Scheduled

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


def scheduled(step: SchedulerOutput) -> Scheduled:
    """A step, as the scheduler describes it."""
    begun = step.scheduled_new_reqs
    new = [
        EngineRequest(
            new.req_id, new.prompt_token_ids, len(new.prompt_token_ids), new.sampling_params
        )
        for new in begun
        if can_draft(new)
    ]
    gone = list(step.finished_req_ids)
    if len(new) < len(begun):
        gone += [new.req_id for new in begun if not can_draft(new)]
    counts, drafts = step.num_scheduled_tokens, step.scheduled_spec_decode_tokens
    requests, drafted = len(counts), sum(map(len, drafts.values()))
    decodes = not begun and sum(counts.values()) == requests + drafted
    return Scheduled(
        gone,
        new,
        ((req_id, _count(drafts.get(req_id, ()))) for req_id in counts),
        Decodes(requests, drafted) if decodes and requests else None,
    )


def _count(drafts: Any) -> int:
    """How many tokens are verified: vLLM's placeholders (-1) are not."""
    if not drafts or drafts[-1] >= 0:
        return len(drafts)
    return sum(token >= 0 for token in drafts)


def described(state: Any, req_id: str, text: Any) -> EngineRequest | None:
    """A running request, if the draft can follow it.

    Args:
        state: vLLM's cached state of it.
        req_id: vLLM's id.
        text: its tokens, ``[length]`` int32.
    """
    if not can_draft(state):
        return None
    return EngineRequest(req_id, text, state.num_prompt_tokens, state.sampling_params)
