"""Checks of the target's messages before anything is computed: garbage must not end the draft."""

from __future__ import annotations

import math
from typing import NamedTuple

from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.wire.messages import Proposed, Start, ToDraft, Trimmed, Verified
from vllm_ssd.wire.packing import unpack

MAX_HANDLE = 2**31 - 1
"""Handles travel as int32."""
_MAX_TOP_K = 2**31 - 1
"""It is kept as int32."""


class Bounds(NamedTuple):
    """The bounds of the fields of a message."""

    vocab_size: int
    max_model_len: int
    num_speculative_tokens: int


def check(message: ToDraft, bounds: Bounds) -> None:
    """Refuse a message with a field out of range.

    Raises:
        ValueError: says what is out of range.
    """
    match message:
        case Start():
            _check_tokens(unpack(message.tokens), bounds)
            if not message.tokens or not 0 <= message.handle <= MAX_HANDLE:
                raise ValueError(f"request {message.handle} of {len(message.tokens)} bytes")
            if not -1 <= message.limit <= bounds.max_model_len:
                raise ValueError(f"limit {message.limit}")
            if not (
                0.0 <= message.temperature < math.inf
                and 0 <= message.top_k <= _MAX_TOP_K
                and 0.0 < message.top_p <= 1.0
            ):
                raise ValueError(
                    f"temperature {message.temperature}, top-k {message.top_k}, "
                    f"top-p {message.top_p}"
                )
        case Verified():
            confirmed, proposed = unpack(message.confirmed_counts), unpack(message.proposed_counts)
            tokens = unpack(message.tokens)
            _check_tokens(tokens, bounds)
            _check_counts(confirmed, len(tokens), least=1)  # a verification emits a token
            _check_counts(proposed, bounds.num_speculative_tokens, least=-1)
            in_all = sum(confirmed.tolist()) + sum(max(0, count) for count in proposed.tolist())
            if in_all != len(tokens):
                raise ValueError("counts that do not add up")
            if not 0.0 <= message.price < math.inf:
                raise ValueError(f"price {message.price}")
        case Proposed():
            counts, tokens = unpack(message.counts), unpack(message.tokens)
            _check_tokens(tokens, bounds)
            _check_counts(counts, bounds.num_speculative_tokens)
            if sum(counts.tolist()) != len(tokens):
                raise ValueError("counts that do not add up")
        case Trimmed():
            _check_counts(unpack(message.verified_counts), bounds.num_speculative_tokens)


def _check_tokens(tokens: Int32Array, bounds: Bounds) -> None:
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < bounds.vocab_size):
        raise ValueError("a token outside the vocabulary")


def _check_counts(counts: Int32Array, most: int, least: int = 0) -> None:
    if counts.size and not (counts.min() >= least and counts.max() <= most):
        raise ValueError(f"a count that is not from {least} to {most}")
