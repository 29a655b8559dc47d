"""What a draft offers, and whether that suits a target."""

from __future__ import annotations

from typing import NamedTuple

from vllm_ssd.core.arms import arms_of
from vllm_ssd.draft.forking import Policy
from vllm_ssd.wire.messages import MAX_ROWS, PROTOCOL, Join


class Offer(NamedTuple):
    """The limits of a draft that is up."""

    model: str
    vocabulary: str
    """A hash of its tokenizer's vocabulary; empty if the target has compared the two itself."""
    vocab_size: int
    """It drafts ids below this."""
    num_speculative_tokens: int
    """The most that a target may ask for."""
    max_branches: int
    """The most branches of a request."""
    max_model_len: int
    sampled_from: int
    """Sampled tokens come from so many of its best; 0: none are sampled."""


def agree(join: Join, offer: Offer) -> Policy:
    """What a target gets.

    Raises:
        ValueError: a sentence for the target's log, which names the option and the mend.
    """
    if join.protocol != PROTOCOL:
        raise ValueError(
            f"the draft speaks protocol {PROTOCOL}, the target {join.protocol}; install the same "
            "version of vllm-ssd on both sides"
        )
    if offer.vocabulary and join.vocabulary != offer.vocabulary:
        raise ValueError(
            f"the tokenizer of the draft model {offer.model!r} differs from the target's; choose "
            "a draft with the target's tokenizer"
        )
    if join.vocab_size < offer.vocab_size:
        raise ValueError(
            f"the draft may draft ids up to {offer.vocab_size - 1}, the target's vocabulary ends "
            f"at {join.vocab_size - 1}; start the draft server with --vocab-size "
            f"{join.vocab_size}"
        )
    k = join.num_speculative_tokens
    if not 1 <= k <= offer.num_speculative_tokens:
        raise ValueError(
            f"option 'num_speculative_tokens' = {k}: the draft drafts at most "
            f"{offer.num_speculative_tokens}; lower it, or start the draft server with "
            f"--num-speculative-tokens {k}"
        )
    each = join.fan_out
    if each and not (len(each) == k + 1 and min(each) >= 0 and max(each) <= MAX_ROWS):
        raise ValueError(f"option 'fan_out': {k + 1} numbers are needed, not {each[: k + 2]}")
    if not 0 <= join.branches <= join.max_branches or join.max_branches < 1:
        raise ValueError(f"option 'branches' = {join.branches}: there are {join.max_branches}")
    sampling = join.draft_sampling if offer.sampled_from else "greedy"
    if sampling not in ("greedy", "probabilistic", "auto"):
        raise ValueError(f"option 'draft_sampling' = {sampling!r} is not known to the draft")
    if sampling != "greedy" and join.draft_top_n < offer.sampled_from:
        raise ValueError(
            f"option 'draft_top_n' = {join.draft_top_n}: the draft samples from "
            f"{offer.sampled_from}; raise it, or start the draft server with --draft-top-n "
            f"{join.draft_top_n}"
        )
    if not (join.saguaro_c == -1.0 or 0.0 <= join.saguaro_c <= 1.0):
        raise ValueError(f"option 'saguaro_c' = {join.saguaro_c}: it is from 0 to 1, or learned")
    return Policy(
        k,
        tuple(join.fan_out) or None,
        min(join.branches, offer.max_branches),
        min(join.max_branches, offer.max_branches),
        arms_of(sampling, join.saguaro_c),
    )
