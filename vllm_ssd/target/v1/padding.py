"""Filling short proposals up to K tokens, where that makes the target's step faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from vllm_ssd.target.lookup import Batch
from vllm_ssd.target.requests import before_min_length

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import CUDAGraphMode


def pads(option: bool | Literal["auto"], graphs: CUDAGraphMode | None) -> bool:
    """Whether to pad.

    A target with FULL graphs for decoding alone replays them only where every request of the batch
    verifies K tokens: one that is short sends the whole batch to slower graphs, whose sizes vLLM
    rounds up to multiples of K + 1 anyway. Graphs that mixed batches replay too, and a target
    without graphs, gain nothing from padding.

    Args:
        option: ``pad_misses``.
        graphs: vLLM's ``cudagraph_mode`` as it was resolved when the KV cache was set up; ``NONE``
            on CPU.
    """
    if option != "auto":
        return option
    return graphs is not None and graphs.separate_routine() and graphs.has_full_cudagraphs()


def pad(
    proposals: list[list[int]], batch: Batch, states: Mapping[str, Any], num_tokens: int
) -> None:
    """Fill proposals up, also those of requests that were not announced to the draft.

    Args:
        proposals: for each row; replaced, not modified.
        batch: the verification they follow.
        states: vLLM's cached states of the requests.
        num_tokens: K.
    """
    for row, tokens in enumerate(batch.sampled):
        if not tokens or len(proposals[row]) == num_tokens:
            continue
        state = states[batch.req_ids[row]]
        length, params = batch.lengths[row], state.sampling_params
        # Not past the end: with streaming input a request goes on where its text ended.
        depth = num_tokens
        if params.max_tokens is not None:
            depth = min(depth, state.num_prompt_tokens + params.max_tokens - 1 - length)
        depth = before_min_length(depth, length, state.num_prompt_tokens + params.min_tokens)
        # Any token is exact; a repeated one reads no further row of the embedding.
        found = proposals[row]
        # Not in place: the list is also the request's record of what was drafted.
        proposals[row] = found + (found or tokens)[-1:] * (depth - len(found))
