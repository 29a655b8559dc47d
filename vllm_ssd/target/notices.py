"""Messages to the draft: new and finished requests, trimmed proposals, outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vllm_ssd.target.lookup import LookUp
from vllm_ssd.target.requests import RequestTable
from vllm_ssd.target.steps import EngineRequest, Scheduled
from vllm_ssd.wire.messages import Finished, Proposed, Start, ToDraft, Trimmed, Verified
from vllm_ssd.wire.packing import pack

if TYPE_CHECKING:
    from vllm_ssd.target.client import DraftClient

ANNOUNCED_TOKENS = 256 << 10
"""Tokens of text announced in one step (1 MiB, a few milliseconds): many long requests take
turns."""


class Notices:
    """Builds the messages to the draft, and keeps the table of the requests announced to it.

    Args:
        client: the client of the draft process.
        requests: that table.
    """

    def __init__(self, client: DraftClient, requests: RequestTable) -> None:
        self._client = client
        self._requests = requests
        self._announced = 0
        """Tokens of text announced in this step."""

    def scheduled(self, step: Scheduled) -> list[ToDraft]:
        """The messages of a step: its new and finished requests, and proposals that were cut."""
        client, requests = self._client, self._requests
        messages: list[ToDraft] = []
        self._announced = 0
        gone = [requests.forget(req_id) for req_id in step.gone]
        handles = [request.handle for request in gone if request is not None]
        for new in step.new:
            again = requests.forget(new.req_id)
            if again is not None:
                handles.append(again.handle)
            if client.up and self._may_announce():
                messages.append(self._announce(new))
        if handles:
            messages.insert(0, Finished(pack(handles)))
            for handle in handles:
                client.published.drop(handle)
        messages += self.trimmed(step.verified)
        return messages

    def trimmed(self, verified: Iterable[tuple[str, int]]) -> list[ToDraft]:
        """The message of proposals that the scheduler cut (token budget, grammar, length).

        Args:
            verified: requests, and how many of the tokens proposed for each are verified.
        """
        handles, counts = [], []
        for req_id, tokens in verified:
            request = self._requests.get(req_id)
            if request is None or not request.proposed:
                continue
            count = min(tokens, len(request.proposed))  # padding was not drafted
            if count != request.verifying:
                request.verifying = count
                handles.append(request.handle)
                counts.append(count)
        return [Trimmed(pack(handles), pack(counts))] if handles else []

    def announced_again(self, running: EngineRequest) -> list[ToDraft]:
        """The messages that announce a running request, which this epoch does not have yet."""
        messages: list[ToDraft] = []
        known = self._requests.forget(running.req_id)
        if known is not None:
            messages.append(Finished(pack([known.handle])))
            self._client.published.drop(known.handle)
        if self._may_announce():
            messages.append(self._announce(running))
        return messages

    def verified(
        self,
        look_ups: Sequence[LookUp],
        verify_us: int,
        speculate: bool = True,
        price: float = 0.0,
    ) -> Verified:
        """The message of a verification: what was confirmed, and what is proposed now.

        Requests that are waited for are named in it; :meth:`proposed` follows.
        """
        handles, lengths, confirmed, proposed = [], [], [], []
        tokens: list[int] = []
        for look_up in look_ups:
            request, new = look_up.request, look_up.confirmed
            handles.append(request.handle)
            lengths.append(request.length)
            confirmed.append(len(new))
            tokens += new
            if look_up.before is None:
                proposed.append(len(request.proposed))
                tokens += request.proposed
            else:
                proposed.append(-1)
                look_up.confirmed = []  # the draft has them
            request.length = look_up.length
        return Verified(
            pack(handles),
            pack(lengths),
            pack(confirmed),
            pack(proposed),
            pack(tokens),
            verify_us,
            speculate,
            price,
        )

    def proposed(self, look_ups: Sequence[LookUp]) -> Proposed:
        """The message of what is proposed for requests that were waited for."""
        requests = [look_up.request for look_up in look_ups]
        return Proposed(
            pack([request.handle for request in requests]),
            pack([len(request.proposed) for request in requests]),
            pack([token for request in requests for token in request.proposed]),
        )

    def _may_announce(self) -> bool:
        """Whether one more text may go with this step; if not, it is announced in a later one."""
        return self._announced < ANNOUNCED_TOKENS

    def _announce(self, request: EngineRequest) -> Start:
        self._announced += len(request.tokens)
        return self._requests.announce(*request)
