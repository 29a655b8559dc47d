"""vLLM's rejection sampler where it is slow or wrong.

With speculative decoding vLLM (0.32 and 0.33) calls it in every step. A step without drafts is
better sampled as plain vLLM does it; :class:`RejectionSampler` does that, on any device.

On CPU without Triton, there are three faults at temperature > 0 besides:

* per-request temperature, top-k and top-p are expanded into a copy that is thrown away, so that
  uninitialised memory is used (upstream issue 55005);
* a draft of -1, vLLM's placeholder for no draft, is used as an index instead of being rejected;
* random numbers for a whole vocabulary are drawn for each request, rejected or not: a millisecond
  each at 49,000 tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.triton_utils import HAS_TRITON
from vllm.v1.sample import rejection_sampler

if TYPE_CHECKING:
    from vllm.v1.outputs import SamplerOutput
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

vllm_rejection_sample = rejection_sampler.rejection_sample


class RejectionSampler(rejection_sampler.RejectionSampler):
    """vLLM's, but not for steps without drafts."""

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Sample what follows each request's text; see vLLM's."""
        if not metadata.max_spec_len:
            return self.sampler(logits, sampling_metadata, predict_bonus_token=True)
        return super().forward(metadata, draft_probs, logits, sampling_metadata)


def fix_cpu_rejection_sampler() -> None:
    """Replace the faulty functions in this process, where they are in use."""
    if HAS_TRITON:
        return
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    rejection_sampler.rejection_sample = rejection_sample


def rejection_sample(
    draft_token_ids: torch.Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_logits: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    sampling_metadata: SamplingMetadata,
    synthetic_mode: bool = False,
    synthetic_conditional_rates: torch.Tensor | None = None,
    use_fp64_gumbel: bool = False,
) -> torch.Tensor:
    """Accept or reject drafted tokens (same contract as vLLM's ``rejection_sample``).

    Only what a rejection needs is computed: one recovered token a request at most.

    Args:
        draft_token_ids: ``[m]`` int32, those of all requests in turn; -1 is rejected.
        num_draft_tokens: for each request how many.
        max_spec_len: the most of these.
        cu_num_draft_tokens: ``[batch]``, cumulative.
        draft_probs: ``[m, vocabulary]`` float32, what each was sampled from; ``None``: certain.
        target_logits: ``[m, vocabulary]`` float32, after temperature, top-k and top-p.
        bonus_token_ids: ``[batch, 1]``.
        sampling_metadata: vLLM's, of the batch.
        synthetic_mode: as vLLM has it.
        synthetic_conditional_rates: as vLLM has them.
        use_fp64_gumbel: without meaning here: the sums are float64.

    Returns:
        ``[batch, max_spec_len + 1]`` int32; -1 after the last token of a request.
    """
    if sampling_metadata.all_greedy or synthetic_mode:
        return vllm_rejection_sample(
            draft_token_ids,
            num_draft_tokens,
            max_spec_len,
            cu_num_draft_tokens,
            draft_probs,
            target_logits,
            bonus_token_ids,
            sampling_metadata,
            synthetic_mode,
            synthetic_conditional_rates,
            use_fp64_gumbel,
        )
    drafts = draft_token_ids.to(torch.int64)
    generators, device = sampling_metadata.generators, target_logits.device
    draw = rejection_sampler.generate_uniform_probs
    uniform = draw(len(drafts), num_draft_tokens, generators, device)
    # As many of all requests, whatever is rejected: every rank draws the same.
    with_drafts = [min(count, 1) for count in num_draft_tokens]
    uniform_after = draw(sum(with_drafts), with_drafts, generators, device)
    # A token is accepted with probability p / q'.
    p = target_logits.softmax(dim=-1)
    place = torch.arange(len(drafts)), drafts.clamp(min=0)
    accepted = drafts >= 0
    if draft_probs is None:
        accepted &= uniform < p[place]
    else:
        q = draft_probs[place]
        accepted &= (q > 0.0) & (uniform * q < p[place])
    greedy = sampling_metadata.temperature == rejection_sampler.GREEDY_TEMPERATURE
    is_greedy = greedy.tolist()
    best: dict[int, int] = {}
    if any(is_greedy):
        chosen = expand_batch_to_tokens(greedy, cu_num_draft_tokens, len(drafts)).nonzero()[:, 0]
        likeliest = target_logits[chosen].argmax(dim=-1)
        accepted[chosen] = drafts[chosen] == likeliest
        best = dict(zip(chosen.tolist(), likeliest.tolist(), strict=True))

    output: list[list[int]] = []
    rejected: list[tuple[int, int, int, int]] = []
    first, drawn, yes, tokens = 0, 0, accepted.tolist(), drafts.tolist()
    for request, (count, bonus) in enumerate(
        zip(num_draft_tokens, bonus_token_ids[:, 0].tolist(), strict=True)
    ):
        right = next((at for at in range(count) if not yes[first + at]), count)
        text = [*tokens[first : first + right], bonus if right == count else -1]
        if right < count:
            if is_greedy[request]:
                text[-1] = best[first + right]
            else:
                rejected.append((request, right, first + right, drawn))
        output.append(text + [-1] * (max_spec_len + 1 - len(text)))
        first += count
        drawn += with_drafts[request]
    result = torch.tensor(output, dtype=torch.int32)
    if rejected:
        requests, positions, where, numbers = map(list, zip(*rejected, strict=True))
        theirs = None if draft_probs is None else draft_probs[where]
        found = recovered(p[where], drafts[where], theirs, uniform_after[numbers])
        result[requests, positions] = found
    return result


def recovered(
    p: torch.Tensor, drafts: torch.Tensor, q: torch.Tensor | None, uniform: torch.Tensor
) -> torch.Tensor:
    """Sample in place of rejected tokens: from what p has beyond q'.

    Args:
        p: ``[m, vocabulary]`` float32, the target's distributions.
        drafts: ``[m]`` int64, the rejected tokens; -1 for none.
        q: ``[m, vocabulary]`` float32, what they were sampled from; ``None``: they were certain.
        uniform: ``[m]`` float64, random numbers in [0, 1).

    Returns:
        ``[m]`` int32.
    """
    if q is None:
        rest = p.scatter(1, drafts.clamp(min=0)[:, None], 0.0)
        rest[drafts < 0] = p[drafts < 0]
    else:
        rest = (p - q).clamp_(min=0.0)
    sums = rest.cumsum(dim=-1, dtype=torch.float64)
    nothing = sums[:, -1] == 0.0
    if nothing.any():  # p = q' but for rounding
        sums[nothing] = p[nothing].cumsum(dim=-1, dtype=torch.float64)
    # The first whose sum exceeds the number, so never one of probability 0.
    tokens = torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)[:, 0]
    return tokens.clamp_(max=p.shape[-1] - 1).to(torch.int32)


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
