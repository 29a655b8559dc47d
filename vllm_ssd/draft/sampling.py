"""What a sampled token is drawn from (q'), and the draw, on the model's device.

Given the logits l of the draft's N best tokens and a request's temperature T::

    q  = softmax(l / T), cut by the request's top-k and top-p as vLLM cuts the target's
    q' = q, without end tokens and tokens below SMALLEST, times C for the F likeliest of the rest
         (arXiv 2603.03251, Definition 14), divided by its sum, in float32

The token is drawn from exactly these float32 numbers, and they are what the target verifies it by.
All that cuts a proposal short is taken out before the draw: a token that ends its request is
proposed with probability 0, not cut when it was drawn. If nothing is left (all mass is on end
tokens), the first choice is taken for certain.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import torch

from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.draft.model import Sampling

SMALLEST = 1e-4
"""Tokens with a smaller probability are not sampled: they would widen what is sent for all rows.
Without them less than N times this is lost in acceptance."""
_COLDEST = 0.01
"""The lowest temperature above 0 that vLLM uses."""
_LEAST_LEFT = 1e-6
"""If C leaves less than this of q, nothing is weighed."""


class DeviceSampling(NamedTuple):
    """:class:`Sampling` on the model's device, in the same shapes."""

    sampled: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    ends: torch.Tensor
    weighed: torch.Tensor
    weight: torch.Tensor


def send_sampling(sampling: Sampling, device: torch.device) -> DeviceSampling:
    """Bring the parameters to the device, in one copy; on CPU they stay where they are."""
    if device.type == "cpu":
        return DeviceSampling(*map(torch.from_numpy, sampling))
    from vllm.utils.torch_utils import async_tensor_h2d

    floats = (sampling.temperature, sampling.top_p, sampling.weight)
    integers = (sampling.sampled, sampling.top_k, sampling.weighed)
    columns = [
        *(values.view(np.int32) for values in floats),
        *(values.astype(np.int32) for values in integers),
    ]
    joined: Int32Array = np.concatenate([np.stack(columns, axis=1), sampling.ends], axis=1)
    # From pinned memory, which is not reused before the copy is done.
    sent = async_tensor_h2d(joined, device=device)
    temperature, top_p, weight = sent[:, :3].contiguous().view(torch.float32).unbind(1)
    sampled, top_k, weighed = sent[:, 3:6].unbind(1)
    return DeviceSampling(sampled.bool(), temperature, top_k, top_p, sent[:, 6:], weighed, weight)


def own_generator(device: torch.device) -> torch.Generator:
    """Random numbers that nothing else draws from, seeded from the operating system's entropy.

    torch's global generator will not do: vLLM seeds it alike in every process.
    """
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
    return generator


def stated_probabilities(values: torch.Tensor, sampling: DeviceSampling) -> torch.Tensor:
    """The probabilities of C choices as the request's own sampling will see them.

    Args:
        values: ``[n, C]`` logits, best first.
        sampling: of the n requests.

    Returns:
        ``[n, C]`` float32; each row sums to 1.
    """
    return _cut(values.float(), sampling)


def proposals(values: torch.Tensor, tokens: torch.Tensor, sampling: DeviceSampling) -> torch.Tensor:
    """q' of each sequence.

    Args:
        values: ``[n, N]`` logits, best first.
        tokens: ``[n, N]``, theirs.
        sampling: of the n sequences.

    Returns:
        ``[n, N]`` float32; each row sums to 1. One-hot for the first choice where nothing is
        sampled, and where nothing but end tokens is left.
    """
    q = _cut(values.float(), sampling)
    ends = (tokens[:, :, None] == sampling.ends[:, None, :]).any(-1)
    q.masked_fill_(ends, 0.0)
    left = q > 0.0
    weighed = left & (left.cumsum(1) <= sampling.weighed[:, None])
    lighter = torch.where(weighed, q * sampling.weight[:, None], q)
    total = lighter.sum(1, keepdim=True)
    q = torch.where(total > _LEAST_LEFT, lighter, q)
    q.masked_fill_(q < SMALLEST * q.sum(1, keepdim=True), 0.0)
    total = q.sum(1, keepdim=True)
    q /= total
    certain = ~(sampling.sampled[:, None] & (total > 0.0))
    q.masked_fill_(certain, 0.0)
    q[:, 0] += certain[:, 0]
    return q


def draw(q: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token of each row, drawn from float32 probabilities.

    Args:
        q: ``[n, N]``.
        tokens: ``[n, N]``.
        generator: gives one number for each row.

    Returns:
        ``[n]``; none has a probability of 0.
    """
    up_to = q.cumsum(1, dtype=torch.float64)
    total = up_to[:, -1:]
    at = torch.rand((len(q), 1), dtype=torch.float64, device=q.device, generator=generator) * total
    # The product may be rounded up to the total, beyond the last token with a probability.
    index = ((up_to <= at) & (up_to < total)).sum(1, keepdim=True)
    return tokens.gather(1, index)[:, 0]


def _cut(values: torch.Tensor, sampling: DeviceSampling) -> torch.Tensor:
    """softmax(values / temperature), cut by top-k and top-p; at temperature 0 softmax(values).

    As vLLM cuts: logits below the k-th are out; then the tokens before which the others have p
    together, the largest first.
    """
    count = values.shape[1]
    cold = sampling.temperature == 0.0
    temperature = torch.where(cold, 1.0, sampling.temperature.clamp(min=_COLDEST))
    scaled = values / temperature[:, None]
    top_k = torch.where(cold | (sampling.top_k <= 0), count, sampling.top_k.clamp(max=count))
    smallest = scaled.gather(1, top_k[:, None].long() - 1)
    q = scaled.masked_fill_(scaled < smallest, float("-inf")).softmax(1).nan_to_num_()
    top_p = torch.where(cold, 1.0, sampling.top_p)[:, None]
    out = (q.cumsum(1) - q >= top_p) & (top_p < 1.0)
    q.masked_fill_(out, 0.0)
    return q.div_(q.sum(1, keepdim=True)).nan_to_num_()
