"""Fixes of vLLM's rejection sampler on CPU without Triton.

Three faults show at temperature > 0 there (vLLM 0.32 and 0.33):

* per-request temperature, top-k and top-p are expanded into a copy that is thrown away, so that
  uninitialised memory is used (upstream issue 55005);
* a draft of -1, vLLM's placeholder for no draft, is used as an index instead of being rejected;
* top-k without top-p takes the maximum of an empty tensor when no request of a batch has a draft,
  as after a prompt, which crashes the engine.
"""

from __future__ import annotations

from typing import Any

import torch

_REJECTED = 2.0
"""In place of a uniform random number: no ratio of probabilities reaches it."""


def fix_cpu_rejection_sampler() -> None:
    """Replace the faulty functions in this process, where they are in use."""
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.sample import rejection_sampler

    if HAS_TRITON or rejection_sampler.expand_batch_to_tokens is expand_batch_to_tokens:
        return
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    original = rejection_sampler._rejection_random_sample

    def reject_negative_ids(
        output_token_ids: torch.Tensor,
        cu_num_draft_tokens: torch.Tensor,
        draft_token_ids: torch.Tensor,
        draft_probs: torch.Tensor | None,
        target_probs: torch.Tensor,
        bonus_token_ids: torch.Tensor,
        recovered_token_ids: torch.Tensor,
        uniform_probs: torch.Tensor,
        *rest: Any,
    ) -> Any:
        absent = draft_token_ids < 0
        if absent.any():
            draft_token_ids = draft_token_ids.clamp(min=0)
            uniform_probs = uniform_probs.masked_fill(absent, _REJECTED)
        return original(
            output_token_ids,
            cu_num_draft_tokens,
            draft_token_ids,
            draft_probs,
            target_probs,
            bonus_token_ids,
            recovered_token_ids,
            uniform_probs,
            *rest,
        )

    # The sampler of the next engine in this process reads this attribute when it is built.
    reject_negative_ids.register_warmup = original.register_warmup  # type: ignore[attr-defined]
    rejection_sampler._rejection_random_sample = reject_negative_ids
    constrain = rejection_sampler.apply_sampling_constraints

    def constrain_what_there_is(
        logits: torch.Tensor, cu_num_draft_tokens: torch.Tensor, sampling_metadata: Any
    ) -> Any:
        if logits.shape[0] == 0:
            return logits
        return constrain(logits, cu_num_draft_tokens, sampling_metadata)

    rejection_sampler.apply_sampling_constraints = constrain_what_there_is


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Repeat each request's value for each of its tokens (same contract as vLLM's).

    Args:
        x: ``[batch]``.
        cu_num_tokens: ``[batch]``, cumulative token counts.
        num_tokens: their total.
        replace_from: a value replaced on the way.
        replace_to: by this one.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).to(torch.int64)
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)
