"""What a target asks of its draft, from the options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_ssd.wire.messages import PROTOCOL, Join

if TYPE_CHECKING:
    from vllm_ssd.config import SSDConfig


def join_of(config: SSDConfig, vocab_size: int, vocabulary: str = "") -> Join:
    """The message with which a target joins a draft.

    Args:
        config: the options.
        vocab_size: the target's.
        vocabulary: a hash of its tokenizer's vocabulary; empty if the draft's was compared already.
    """
    return Join(
        protocol=PROTOCOL,
        vocabulary=vocabulary,
        vocab_size=vocab_size,
        num_speculative_tokens=config.num_speculative_tokens,
        fan_out=list(config.fan_out_per_k or ()),
        branches=0 if config.branches == "auto" else config.branches,
        max_branches=config.max_branches,
        draft_sampling=config.draft_sampling,
        draft_top_n=config.draft_top_n,
        saguaro_c=-1.0 if config.saguaro_c == "auto" else config.saguaro_c,
    )
