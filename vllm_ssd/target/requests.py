"""The requests announced to the draft, and what was sent to it of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_ssd.wire.messages import Start, pack

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu_input_batch import CachedRequestState


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
    verifying: int = 0
    """How many of the proposed tokens the scheduler lets be verified."""
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
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
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
            sampling_params: vLLM's, for ``max_tokens``, ``min_tokens`` and the end tokens.
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
        return Start(handle, pack(tokens), limit, ends)


def end_tokens(sampling_params: Any) -> list[int]:
    """The token ids that end a request."""
    ends = list(sampling_params.stop_token_ids or ())
    eos = sampling_params.eos_token_id
    if eos is not None and not sampling_params.ignore_eos:
        ends.insert(0, eos)
    return ends


def can_draft(request: NewRequestData | CachedRequestState) -> bool:
    """Whether a request of vLLM's (new or cached state) is one the draft can follow: plain tokens.

    Prompt embeddings and multimodal inputs are not text; a LoRA adapter changes the target's
    distribution, but not the draft's.
    """
    return (
        request.prompt_token_ids is not None
        and request.prompt_embeds is None
        and not request.mm_features
        and request.lora_request is None
        and request.sampling_params is not None
    )
