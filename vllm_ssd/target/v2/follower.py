"""Follows the requests behind the steps: announces them, tells the draft what came of them, counts.

All of it runs on the draft's thread, a step behind the device. What is proposed was decided on the
device; the draft is told what that was.
"""

from __future__ import annotations

import logging
import time
from array import array
from dataclasses import dataclass
from typing import Any

from vllm_ssd.core.stats import Stats
from vllm_ssd.target.client import DraftClient
from vllm_ssd.target.lookup import LookUp
from vllm_ssd.target.notices import ANNOUNCED_TOKENS, Notices
from vllm_ssd.target.requests import RequestTable, Tracked, can_draft, end_tokens
from vllm_ssd.target.v2.outcomes import Row
from vllm_ssd.target.v2.slots import Begun
from vllm_ssd.target.v2.tally import Tally
from vllm_ssd.target.v2.writer import TreeWriter
from vllm_ssd.wire.messages import Finished, ToDraft
from vllm_ssd.wire.packing import pack

logger = logging.getLogger("vllm.vllm_ssd")


@dataclass(slots=True)
class _Running:
    """A request in a slot that the draft can follow."""

    name: str
    """Its serial, as the table of requests has it."""
    slot: int
    text: array[int]
    """All its tokens so far; the device has them too, but out of the host's reach."""
    prompt_length: int
    sampling_params: Any
    ends: frozenset[int]
    """Tokens that end it."""
    longest: int
    """It ends at this length at the latest."""
    ended: bool = False
    """What is sampled further on, until vLLM takes the slot away, is not its text."""

    def confirm(self, tokens: list[int]) -> None:
        """Its text goes on with these tokens."""
        self.text.extend(tokens)
        self.ended = len(self.text) >= self.longest or not self.ends.isdisjoint(tokens)


_GoingOn = tuple[Row, _Running, Tracked | None]
"""An outcome, the request it belongs to, and what was announced of it."""


class Follower:
    """Turns what happens to requests into messages to the draft.

    Args:
        client: the draft's.
        writer: where its trees go.
        requests: those announced to it, by their serials as text.
        stats: counters to keep.
    """

    def __init__(
        self, client: DraftClient, writer: TreeWriter, requests: RequestTable, stats: Stats
    ) -> None:
        self._client = client
        self._writer = writer
        self._requests = requests
        self._stats = stats
        self._notices = Notices(client, requests)
        self._tally = Tally(stats)
        self._running: dict[int, _Running] = {}
        self._left_alone: set[int] = set()
        """Requests in slots that the draft cannot follow."""
        self._has_said = False
        """That there are such requests."""
        self._prefilling: set[int] = set()
        """Requests in slots that have had no outcome yet."""
        self._verified_at: float | None = None
        self._announced = 0
        """Tokens of text announced with this step."""

    def scheduled(self, gone: list[int], begun: list[Begun]) -> None:
        """Requests have left their slots, others have taken some."""
        self._announced = 0
        messages = self._forget(gone)
        for serial, slot, new in begun:
            self._prefilling.add(serial)
            if not can_draft(new):
                self._leave_alone(serial)
                continue
            params, text = new.sampling_params, array("i", new.prefill_token_ids)
            longest = new.prompt_len + (params.max_tokens or self._requests.max_length)
            ends = frozenset(end_tokens(params))
            running = _Running(str(serial), slot, text, new.prompt_len, params, ends, longest)
            self._running[serial] = running
            if self._client.up:
                messages += self._announce(running)
        self._client.send(messages)

    def verified(self, rows: list[Row]) -> None:
        """A step has ended: its outcome, and what is proposed next."""
        prefills = bool(self._prefilling)
        going_on, lost = self._confirm(rows)
        messages = self._give_up(lost)
        if not self._client.up:
            self._stats.missed("draft_down", len(going_on))
            return
        self._announced = 0
        look_ups = []
        for row, running, request in going_on:
            if request is None:
                self._stats.missed("resync", 1)
                messages += self._announce(running)
            else:
                look_ups.append(self._look_up(row, running, request))
        verify_us = self._measure(look_ups, prefills)
        if look_ups:
            messages.append(self._notices.verified(look_ups, verify_us))
        self._client.send(messages)

    def trimmed(self, cut: list[tuple[int, int]]) -> None:
        """The scheduler has cut what was proposed last.

        Args:
            cut: serials, and how many tokens of each proposal are verified, filling included.
        """
        verified = ((str(serial), tokens) for serial, tokens in cut)
        self._client.send(self._notices.trimmed(verified))

    def _confirm(self, rows: list[Row]) -> tuple[list[_GoingOn], list[int]]:
        """The texts go on with what was sampled.

        Returns:
            Those that have not ended with it; the serials of those of which a piece is missing.
        """
        going_on: list[_GoingOn] = []
        lost = []
        for row in rows:
            if not row.sampled:
                continue
            self._prefilling.discard(row.serial)
            running = self._running.get(row.serial)
            if running is None:
                if row.serial in self._left_alone:
                    self._stats.misses_cannot_draft += 1
                    self._tally.verified(row)
                    self._tally.proposed(row)
                continue
            if running.ended:
                continue
            if len(running.text) + len(row.sampled) != row.length:
                lost.append(row.serial)
                continue
            running.confirm(row.sampled)
            self._tally.verified(row)
            if not running.ended:
                row = _without_ends(row, running.ends)
                self._tally.proposed(row)
                going_on.append((row, running, self._requests.get(running.name)))
        return going_on, lost

    def _give_up(self, lost: list[int]) -> list[ToDraft]:
        """An error has cost an outcome of these requests: their texts are not known any more."""
        if lost and not self._stats.texts_lost:
            logger.warning("ssd: an outcome was lost; its requests are not drafted for any more")
        self._stats.texts_lost += len(lost)
        messages = self._forget(lost)
        self._left_alone.update(lost)
        return messages

    def _leave_alone(self, serial: int) -> None:
        """The draft cannot follow this request."""
        if not self._has_said:
            self._has_said = True
            logger.info(
                "ssd: no drafts for requests with LoRA, multimodal inputs or prompt embeddings; "
                "counted as misses_cannot_draft"
            )
        self._left_alone.add(serial)

    def _look_up(self, row: Row, running: _Running, request: Tracked) -> LookUp:
        """What the device has found for a request, as V1 would have found it."""
        length, confirmed = row.length, row.sampled
        if request.length + len(confirmed) != length:  # the draft was not told of some before
            confirmed = running.text[request.length :].tolist()
        # The draft follows no text beyond the limit, where it itself proposes nothing.
        proposed = row.proposed + row.ngram[: max(0, request.limit - length - len(row.proposed))]
        request.proposed, request.verifying = proposed, len(proposed)
        request.look_ups += 1
        if request.limit > length:
            self._tally.looked_up(row, request)
        elif request.limit < length:  # longer than the draft can follow
            self._stats.misses_cannot_draft += 1
        return LookUp(-1, request, confirmed, length, wanted=len(proposed))

    def _announce(self, running: _Running) -> list[ToDraft]:
        """Announce a request with its whole text; in a later step if there is too much at once."""
        if self._announced >= ANNOUNCED_TOKENS:
            return []
        self._announced += len(running.text)
        start = self._requests.announce(
            running.name, running.text, running.prompt_length, running.sampling_params
        )
        self._writer.assign(start.handle, running.slot)
        return [start]

    def _forget(self, serials: list[int]) -> list[ToDraft]:
        handles = []
        for serial in serials:
            self._running.pop(serial, None)
            self._tally.forget(serial)
            self._left_alone.discard(serial)
            self._prefilling.discard(serial)
            request = self._requests.forget(str(serial))
            if request is not None:
                self._writer.drop(request.handle)
                handles.append(request.handle)
        return [Finished(pack(handles))] if handles else []

    def _measure(self, look_ups: list[LookUp], prefills: bool) -> int:
        """Microseconds since the last outcome; 0 if that was no usual verification: there were
        prefills in it, or no request has been decoding since."""
        before, self._verified_at = self._verified_at, time.perf_counter()
        if before is None or not any(each.request.look_ups > 1 for each in look_ups):
            return 0
        seconds = self._verified_at - before
        self._stats.verify_seconds += seconds
        self._stats.verify_intervals += 1
        self._stats.recent["verify_seconds"].add(seconds)
        return 0 if prefills else int(seconds * 1e6)


def _without_ends(row: Row, ends: frozenset[int]) -> Row:
    """Its tokens from the text up to one that ends the request; what comes then only fills up.

    The draft proposes none either: verification yields an end token without that, as the bonus.
    """
    at = next((at for at, token in enumerate(row.ngram) if token in ends), len(row.ngram))
    return row._replace(ngram=row.ngram[:at], filled=row.filled + len(row.ngram) - at)
