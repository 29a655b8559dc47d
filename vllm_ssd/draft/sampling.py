"""What a sampled token is drawn from (q'), and the draw.

Given the logits l of the draft's best tokens and a request's temperature T::

    q  = softmax(l / T), cut by the request's top-k and top-p as vLLM cuts the target's
    q' = q of the N best tokens, without end tokens and tokens below SMALLEST, times C for the F
         likeliest of the rest (arXiv 2603.03251, Definition 14), divided by its sum, in float32

The token is drawn from exactly these float32 numbers, and they are what the target verifies it by.
All that cuts a proposal short is taken out before the draw: a token that ends its request is
proposed with probability 0, not cut when it was drawn. If an end token is the first choice and less
than half of q is left without them all, the request ends there, with that token, for certain.

The same code computes with tensors of the model's device and, where that is the CPU, with arrays:
numpy's calls cost a fraction of torch's there.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.draft.inputs import cut, join
from vllm_ssd.draft.model import Sampling

SMALLEST = 1e-4
"""Tokens with a smaller probability are not sampled: they would widen what is sent for all rows.
Without them less than N times this is lost in acceptance."""
_COLDEST = np.float32(0.01)
"""The lowest temperature above 0 that vLLM uses."""
_LEAST_LEFT = 1e-6
"""If C leaves less than this of q, nothing is weighed."""
_MOSTLY = 0.5
"""So much of q must be left without end tokens, if one of them is the first choice."""

Array = Any
"""A tensor or an array."""


class Parameters(NamedTuple):
    """:class:`Sampling` in the same shapes, where it is computed with."""

    sampled: Array
    temperature: Array
    """1 for greedy requests."""
    top_k: Array
    top_p: Array
    ends: Array
    weighed: Array
    weight: Array
    top_ks: bool
    """Whether any request has a top-k, ..."""
    top_ps: bool
    """... a top-p, ..."""
    weighs: bool
    """... or tokens that are weighed."""


def parameters_on_host(sampling: Sampling) -> Parameters:
    """The parameters of a step. Greedy requests state what the logits say."""
    temperature, top_k, top_p = sampling.temperature, sampling.top_k, sampling.top_p
    cold = temperature == 0.0
    temperature = np.maximum(temperature, _COLDEST)
    if cold.any():
        temperature[cold] = 1.0
        top_k, top_p = np.where(cold, 0, top_k), np.where(cold, np.float32(1.0), top_p)
    return Parameters(
        sampling.sampled,
        temperature,
        top_k,
        top_p,
        sampling.ends,
        sampling.weighed,
        sampling.weight,
        bool(top_k.any()),
        bool((top_p < 1.0).any()),
        bool(sampling.weighed.any()),
    )


def parameters_on_device(sampling: Sampling, device: torch.device) -> Parameters:
    """The same on a device, in one copy."""
    from vllm.utils.torch_utils import async_tensor_h2d

    here = parameters_on_host(sampling)
    # From pinned memory, which is not reused before the copy is done.
    return split(async_tensor_h2d(joined(here), device=device), here)


def joined(parameters: Parameters) -> Int32Array:
    """All parameters one after the other; float32 by their bits."""
    return join(
        [
            parameters.temperature.view(np.int32),
            parameters.top_p.view(np.int32),
            parameters.weight.view(np.int32),
            parameters.sampled.astype(np.int32),
            parameters.top_k,
            parameters.weighed,
            parameters.ends,
        ]
    )


def split(sent: torch.Tensor, parameters: Parameters) -> Parameters:
    """What :func:`joined` has joined, taken apart on the device."""
    count = len(parameters.sampled)
    shapes = [(count,)] * 6 + [parameters.ends.shape]
    temperature, top_p, weight, sampled, top_k, weighed, ends = cut(sent, shapes)
    return parameters._replace(
        sampled=sampled.bool(),
        temperature=temperature.view(torch.float32),
        top_k=top_k,
        top_p=top_p.view(torch.float32),
        ends=ends,
        weighed=weighed,
        weight=weight.view(torch.float32),
    )


def own_generator(device: torch.device) -> torch.Generator:
    """Random numbers that nothing else draws from, seeded from the operating system's entropy.

    torch's global generator will not do: vLLM seeds it alike in every process.
    """
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
    return generator


@np.errstate(invalid="ignore")
def requested(values: Array, parameters: Parameters) -> Array:
    """softmax(values / temperature), cut by top-k and top-p.

    As vLLM cuts: logits below the k-th are out; then the tokens before which the others have p
    together, the largest first.

    Args:
        values: ``[n, M]`` logits, float32, best first.
        parameters: of the n requests.

    Returns:
        ``[n, M]`` float32; each row sums to 1, or to 0 if the logits are no numbers.
    """
    xp = _library(values)
    scaled = values / parameters.temperature[:, None]
    if parameters.top_ks:
        count = scaled.shape[1]
        top_k = xp.where(parameters.top_k > 0, parameters.top_k, count)
        smallest = _at(scaled, xp.clip(top_k, 1, count) - 1)
        scaled = xp.where(scaled < smallest[:, None], -np.inf, scaled)
    q = xp.exp(scaled - scaled[:, :1])
    q = q / q.sum(axis=1, keepdims=True)
    if parameters.top_ps:
        top_p = parameters.top_p[:, None]
        q = xp.where((q.cumsum(axis=1) - q >= top_p) & (top_p < 1.0), 0.0, q)
        q = q / q.sum(axis=1, keepdims=True)
    return xp.where(q >= 0.0, q, 0.0)  # no NaN


def shares(q: Array, count: int) -> Array:
    """The first choices' shares of the probability that they have together, ``[n, count]``."""
    if count == q.shape[1]:
        return q
    first = q[:, :count]
    total = first.sum(axis=1, keepdims=True)
    return first / _library(q).where(total > 0.0, total, 1.0)


def proposals(q: Array, tokens: Array, parameters: Parameters) -> Array:
    """q' of each sequence.

    Args:
        q: ``[n, N]``, probabilities, best first (:func:`requested`).
        tokens: ``[n, N]``, theirs.
        parameters: of the n sequences.

    Returns:
        ``[n, N]`` float32; each row sums to 1. One-hot for the first choice where nothing is
        sampled, and where the request most likely ends.
    """
    xp = _library(q)
    total = q.sum(axis=1)
    enough = total > 0.0
    if parameters.ends.shape[1]:
        ends = (tokens[:, :, None] == parameters.ends[:, None, :]).any(axis=2)
        q = xp.where(ends, 0.0, q)
        enough = q.sum(axis=1) > total * xp.where(ends[:, 0], _MOSTLY, 0.0)
    if parameters.weighs:
        possible = q > 0.0
        weighed = possible & (possible.cumsum(axis=1) <= parameters.weighed[:, None])
        lighter = xp.where(weighed, q * parameters.weight[:, None], q)
        q = xp.where(lighter.sum(axis=1, keepdims=True) > _LEAST_LEFT, lighter, q)
    q = xp.where(q < SMALLEST * q.sum(axis=1, keepdims=True), 0.0, q)
    sampled = parameters.sampled & enough
    total = xp.where(sampled, q.sum(axis=1), 1.0)
    q = xp.where(sampled[:, None], q / total[:, None], 0.0)
    q[:, 0] += ~sampled
    return q


def draw(q: Array, tokens: Array, uniform: Array) -> Array:
    """A token of each row, drawn from float32 probabilities.

    Args:
        q: ``[n, N]``.
        tokens: ``[n, N]``.
        uniform: ``[n, 1]``, float64 random numbers from [0, 1).

    Returns:
        ``[n]``; none has a probability of 0.
    """
    up_to = q.cumsum(axis=1, dtype=_library(q).float64)
    total = up_to[:, -1:]
    # The product may be rounded up to the total, beyond the last token with a probability.
    index = ((up_to <= uniform * total) & (up_to < total)).sum(axis=1)
    return _at(tokens, index)


def _library(values: Array) -> Any:
    """The library that computes with it."""
    return torch if isinstance(values, torch.Tensor) else np


def _at(values: Array, index: Array) -> Array:
    """One value of each row, ``[n]``."""
    if isinstance(values, torch.Tensor):
        return values.gather(1, index[:, None].long())[:, 0]
    return values[np.arange(len(values)), index]
