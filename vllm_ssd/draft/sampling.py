"""What a sampled token is drawn from (q'), and the draw, on the model's device.

Given the logits l of the draft's N best tokens and a request's temperature T::

    q  = softmax(l / T), cut by the request's top-k and top-p as vLLM cuts the target's
    q' = q, without end tokens and tokens below SMALLEST, times C for the F likeliest of the rest
         (arXiv 2603.03251, Definition 14), divided by its sum, in float32

The token is drawn from exactly these float32 numbers, and they are what the target verifies it by.
All that cuts a proposal short is taken out before the draw: a token that ends its request is
proposed with probability 0, not cut when it was drawn. If an end token is the first choice and less
than half of q is left without them all, the request ends there, with that token, for certain.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import torch

from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.draft.inputs import cut, join
from vllm_ssd.draft.model import Sampling

SMALLEST = 1e-4
"""Tokens with a smaller probability are not sampled: they would widen what is sent for all rows.
Without them less than N times this is lost in acceptance."""
_COLDEST = 0.01
"""The lowest temperature above 0 that vLLM uses."""
_LEAST_LEFT = 1e-6
"""If C leaves less than this of q, nothing is weighed."""
_MOSTLY = 0.5
"""So much of q must be left without end tokens, if one of them is the first choice."""


class DeviceSampling(NamedTuple):
    """:class:`Sampling` on the model's device, in the same shapes."""

    sampled: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    ends: torch.Tensor
    weighed: torch.Tensor
    weight: torch.Tensor
    weighs: bool
    """Whether any token is weighed."""


def send_sampling(sampling: Sampling, device: torch.device) -> DeviceSampling:
    """Bring the parameters to the device, in one copy; on CPU they stay where they are."""
    if device.type == "cpu":
        weighs = bool(sampling.weighed.any())
        return DeviceSampling(*map(torch.from_numpy, sampling), weighs)
    from vllm.utils.torch_utils import async_tensor_h2d

    # From pinned memory, which is not reused before the copy is done.
    return split(async_tensor_h2d(joined(sampling), device=device), sampling)


def joined(sampling: Sampling) -> Int32Array:
    """All parameters one after the other; float32 by their bits."""
    return join(
        [
            sampling.temperature.view(np.int32),
            sampling.top_p.view(np.int32),
            sampling.weight.view(np.int32),
            sampling.sampled.astype(np.int32),
            sampling.top_k,
            sampling.weighed,
            sampling.ends,
        ]
    )


def split(sent: torch.Tensor, sampling: Sampling) -> DeviceSampling:
    """What :func:`joined` has joined, taken apart on the device."""
    count = len(sampling.sampled)
    shapes = [(count,)] * 6 + [sampling.ends.shape]
    temperature, top_p, weight, sampled, top_k, weighed, ends = cut(sent, shapes)
    return DeviceSampling(
        sampled.bool(),
        temperature.view(torch.float32),
        top_k,
        top_p.view(torch.float32),
        ends,
        weighed,
        weight.view(torch.float32),
        bool(sampling.weighed.any()),
    )


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
        sampled, and where the request most likely ends.
    """
    q = _cut(values.float(), sampling)
    ends = (tokens[:, :, None] == sampling.ends[:, None, :]).any(-1)
    q.masked_fill_(ends, 0.0)
    left = q.sum(1)
    if sampling.weighs:
        possible = q > 0.0
        weighed = possible & (possible.cumsum(1) <= sampling.weighed[:, None])
        lighter = torch.where(weighed, q * sampling.weight[:, None], q)
        q = torch.where(lighter.sum(1, keepdim=True) > _LEAST_LEFT, lighter, q)
    q.masked_fill_(q < SMALLEST * q.sum(1, keepdim=True), 0.0)
    q /= q.sum(1, keepdim=True)
    sampled = sampling.sampled & (left > torch.where(ends[:, 0], _MOSTLY, 0.0))
    q.masked_fill_(~sampled[:, None], 0.0)
    q[:, 0] += ~sampled
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
