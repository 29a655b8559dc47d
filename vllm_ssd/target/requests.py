"""The requests announced to the draft, and what was sent to it of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_ssd.core.acceptance import Acceptance
from vllm_ssd.wire.messages import MAX_STOP_TOKENS, Start
from vllm_ssd.wire.packing import pack

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData

_GREEDY_BELOW = 1e-5
"""Temperatures at which vLLM takes the likeliest token (``SamplingParams.sampling_type``)."""


class Origin(NamedTuple):
    """Where the tokens of a proposal are from, in this order; none of the counts is negative."""

    found: int
    """The draft, at once."""
    waited: int
    """The draft, after waiting."""
    ngram: int
    """The request's own text."""


@dataclass(slots=True)
class Tracked:
    """One request announced to the draft."""

    handle: int
    length: int
    """Length of its confirmed text, as sent to the draft."""
    limit: int
    """No token is drafted at this position or later."""
    min_length: int = 0
    """From this length on the request may end (``min_tokens``)."""
    ends: frozenset[int] = frozenset()
    """Tokens that end it."""
    proposed: list[int] = field(default_factory=list)
    """The last proposal."""
    origin: Origin | None = None
    """Where its tokens are from; None if all were found at once."""
    verifying: int = 0
    """How many of the proposed tokens the scheduler lets be verified."""
    of_text: Acceptance = field(default_factory=Acceptance)
    """Of tokens that its text has given: texts differ in how they repeat themselves."""
    look_ups: int = 0
    resynced: bool = False
    """Announced when it was running already."""


def most_drafts(request: Tracked, length: int, depth: int) -> int:
    """How many tokens may be proposed after a text of ``length`` tokens; negative at its end."""
    room = request.limit - length
    most = depth if depth < room else room  # less than half the time of min()
    if length >= request.min_length:
        return most
    return before_min_length(most, length, request.min_length)


def before_min_length(most: int, length: int, min_length: int) -> int:
    """``most``, or fewer if the verification would begin before ``min_length`` and end beyond.

    In a verification that begins before ``min_tokens``, vLLM bans end tokens at every position, its
    bonus token included, even at positions beyond: so none of ours reaches beyond.
    """
    return most if length >= min_length else min(most, min_length - length - 1)


class RequestTable:
    """The requests announced to the draft in this epoch, by vLLM's request id.

    Args:
        max_length: no text longer than this is followed.
        sampled_from: sampled drafts come from so many of the draft's best tokens; 0: none are
            sampled.
    """

    def __init__(self, max_length: int, sampled_from: int = 0) -> None:
        self.max_length = max_length
        self._sampled_from = sampled_from
        self._tracked: dict[str, Tracked] = {}
        self._next_handle = 0
        self._sampled: set[str] = set()

    def count_sampled(self, req_ids: Sequence[str]) -> int:
        """How many of these requests have a temperature, of those announced."""
        return sum(map(self._sampled.__contains__, req_ids)) if self._sampled else 0

    def get(self, req_id: str) -> Tracked | None:
        """The request, if it has been announced."""
        return self._tracked.get(req_id)

    def forget_all(self) -> None:
        """A new epoch has begun: no request has been announced in it."""
        self._tracked.clear()
        self._sampled.clear()

    def forget(self, req_id: str) -> Tracked | None:
        """Remove a request that has finished or must be announced again."""
        self._sampled.discard(req_id)
        return self._tracked.pop(req_id, None)

    def announce(self, req_id: str, tokens: Any, prompt_length: int, sampling_params: Any) -> Start:
        """Enter a request, always under a new handle.

        Args:
            req_id: vLLM's id.
            tokens: its whole confirmed text (list or int32 array).
            prompt_length: how many of them are the prompt.
            sampling_params: vLLM's, for ``max_tokens``, ``min_tokens``, the end tokens and what
                drafts may be sampled with.
        """
        # The last token comes from the target itself, so the one before it is the last drafted.
        longest = prompt_length + (sampling_params.max_tokens or self.max_length)
        limit = min(longest, self.max_length) - 1
        handle = self._next_handle
        self._next_handle += 1
        ends = end_tokens(sampling_params)
        min_length = prompt_length + sampling_params.min_tokens
        known = Tracked(handle, len(tokens), limit, min_length, frozenset(ends))
        known.resynced = len(tokens) > prompt_length
        if sampling_params.temperature > 0.0:
            self._sampled.add(req_id)
        self._tracked[req_id] = known
        if not self._sampled_from or not may_sample(sampling_params, ends):
            return Start(handle, pack(tokens), limit, ends)
        # As many as there are anyway, or "all" (0 and -1 in vLLM), is no bound.
        top_k = sampling_params.top_k if sampling_params.top_k < self._sampled_from else 0
        temperature, top_p = sampling_params.temperature, sampling_params.top_p
        return Start(handle, pack(tokens), limit, ends, temperature, max(0, top_k), top_p)


def may_sample(sampling_params: Any, ends: list[int]) -> bool:
    """Whether drafts of a request may be sampled.

    A proposal may be cut short, but never for the tokens sampled for it: an end token with
    probability p, sampled as often and then cut off, would be emitted with probability p squared.
    What cuts a proposal and depends on its tokens is

    * an end token (``lookup.answer``): the draft samples none, unless there are more than it
      checks;
    * a grammar: vLLM's scheduler cuts tokens that break it.

    Everything else depends on lengths and counts alone: ``max_tokens``, ``min_tokens``, the model's
    length, the token budget, padding. What merely bans tokens (bad words, allowed tokens,
    ``min_tokens``) lowers the target's probabilities, and stop strings end a text after the fact.

    Args:
        sampling_params: vLLM's.
        ends: the tokens that end the request.
    """
    return (
        sampling_params.temperature >= _GREEDY_BELOW
        and sampling_params.structured_outputs is None
        and len(ends) <= MAX_STOP_TOKENS
    )


def end_tokens(sampling_params: Any) -> list[int]:
    """The token ids that end a request."""
    ends = list(sampling_params.stop_token_ids or ())
    eos = sampling_params.eos_token_id
    if eos is not None and not sampling_params.ignore_eos:
        ends.insert(0, eos)
    return ends


def can_draft(new: NewRequestData) -> bool:
    """Whether a request is one that the draft can follow: plain tokens.

    Prompt embeddings and multimodal inputs are not text; a LoRA adapter changes the target's
    distribution, but not the draft's.

    Args:
        new: vLLM's description of it, or its runner's: what is read here has the same names there.
    """
    return (
        new.prompt_token_ids is not None
        and new.prompt_embeds is None
        and not new.mm_features
        and new.lora_request is None
        and new.sampling_params is not None
    )
