"""One round after another: announce, look up, wait if it pays, answer, tell.

A front-end (``target/v1``) turns the state of its model runner into plain types
(:class:`Scheduled`, :class:`EngineRequest`, :class:`Batch`), and what is proposed into what its
runner wants.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vllm_ssd.config import SSDConfig
from vllm_ssd.core.stats import Stats
from vllm_ssd.target.decisions import Decisions
from vllm_ssd.target.lookup import Batch, LookUp, answer, choose, lacking, look_up
from vllm_ssd.target.notices import Notices
from vllm_ssd.target.pace import Pace
from vllm_ssd.target.requests import RequestTable
from vllm_ssd.target.sources import Sources, read_sources
from vllm_ssd.target.steps import EngineRequest, Scheduled
from vllm_ssd.target.waiting import Waiting

if TYPE_CHECKING:
    from vllm_ssd.target.client import DraftClient
    from vllm_ssd.wire.messages import ToDraft

logger = logging.getLogger("vllm.vllm_ssd")

KEEP_UP_ROUNDS = 16
"""Rounds without speculation after which the draft is told the texts."""

Describe = Callable[[str, Any], EngineRequest | None]
"""Describes a running request, by its id and its text; None if the draft cannot follow it."""


class Rounds:
    """The target's side of the speculation, without its model runner.

    Args:
        config: the options.
        max_length: no text longer than this is followed.
    """

    def __init__(self, config: SSDConfig, max_length: int) -> None:
        self.config = config
        self.depth = config.num_speculative_tokens
        self.stats = Stats()
        samples = config.draft_sampling != "greedy"
        self.requests = RequestTable(max_length, config.draft_top_n * samples)
        self.pace = Pace()
        self.decisions = Decisions(self.requests, self.pace, self.stats)
        self.client: DraftClient | None = None
        self.pads = config.pad_misses is True
        """Whether the front-end fills proposals up to K tokens anyway."""
        self.off_for = 0
        """Rounds without speculation since the last one with it."""
        self.sources: list[Sources] = []
        """What the proposals of this round were sampled from."""
        self._waiting = Waiting(config, self.stats, self.pace)
        self._notices: Notices | None = None
        self._describe: Describe = lambda req_id, text: None
        self._proposed_at: float | None = None
        self._prefills = False
        """Whether the step under way has prefill tokens."""
        self._nonsense = ""
        """What is wrong with a distribution of this round."""
        self._complained = False

    def connect(self, client: DraftClient, describe: Describe) -> None:
        """Connect to the draft.

        Args:
            client: the draft's.
            describe: of the front-end, for requests that must be announced again.
        """
        self.client = client
        self._describe = describe
        self._notices = Notices(client, self.requests)

    # ---- a step begins

    def scheduled(self, step: Scheduled) -> None:
        """Announce a step to the draft, and take in what the round before it has shown."""
        client, notices = self._connected()
        self.decisions.take_in()
        self.pace.scheduled(step.decodes)
        self._prefills = step.decodes is None
        client.poll()
        client.maintain()
        client.send(notices.scheduled(step))

    # ---- a step has ended

    def propose(self, batch: Batch, began: float, samples: bool) -> Sequence[LookUp]:
        """One round: look up, answer, report; wait between, where that pays.

        Args:
            batch: the verification.
            began: when the front-end began with it.
            samples: whether :attr:`sources` of the proposals are wanted.

        Returns:
            The look-ups, answered: their requests' ``proposed``.
        """
        client, notices = self._connected()
        stats = self.stats
        self.sources.clear()
        client.poll()
        if not client.up:
            stats.missed("draft_down", sum(1 for tokens in batch.sampled if tokens))
            self.decisions.interrupted()
            return ()
        if not self.decisions.speculates(batch, began, self._proposed_at):
            if self.off_for % KEEP_UP_ROUNDS == 0:
                self._keep_up(batch)
            self.off_for += 1
            return ()
        self.off_for = 0
        look_ups, unknown = choose(batch, self.requests, self.depth, stats)
        verify_us = self._measure_verification(look_ups, began)
        messages = self._announce_again(unknown, batch)

        look_up(look_ups, batch, client.published)
        short = lacking(look_ups)
        if short and not self._waiting.for_branches(look_ups, batch, client, began):
            stats.missed("resync", len(look_ups))
            return ()
        self.decisions.begin(look_ups)
        waited = self._waiting.begin(short, client) if short else []
        at_once = [each for each in look_ups if each.before is None] if waited else look_ups
        self._answer(at_once, samples)
        if short:
            self._waiting.prolong([each for each in short if each.before is None], batch)
        if look_ups:
            # Padded, a verification takes the same time whatever was drafted of it.
            price = 0.0 if self.pads else self.pace.price
            messages.append(notices.verified(look_ups, verify_us, price=price))
        client.send(messages)
        if waited and not self._propose_later(waited, batch, began, samples):
            stats.missed("resync", len(waited))
            self.sources.clear()  # nor are those proposed that were answered at once
            return ()
        return look_ups

    def proposed(self, began: float) -> None:
        """The front-end has handed over what was proposed.

        Args:
            began: as for :meth:`propose`.
        """
        if self._nonsense:
            # Now that this round's messages are under way.
            client, _ = self._connected()
            client.resync(f"a distribution that does not make sense: {self._nonsense}")
            self._nonsense = ""
        self._proposed_at = time.perf_counter()
        self.stats.proposals += 1
        self.stats.propose_seconds += self._proposed_at - began

    def degrade(self, error: Exception) -> None:
        """Go on without drafts after an error of ours; one log line, not one a step.

        Raises:
            Exception: the error, with the option ``strict``.
        """
        if self.config.strict:
            raise error
        self.stats.errors += 1
        self.decisions.interrupted()
        if not self._complained:
            self._complained = True
            logger.exception("ssd: error in the plugin; decoding goes on plainly")
        if self.client is not None and self.client.up:
            self.client.resync("an error in the plugin", logged=True)

    # ---- parts of a round

    def _connected(self) -> tuple[DraftClient, Notices]:
        assert self.client is not None
        assert self._notices is not None
        return self.client, self._notices

    def _answer(self, look_ups: Sequence[LookUp], samples: bool) -> None:
        """Decide what is proposed of what was found."""
        if not self.pads:
            # Padded, a verification takes the same time however many of its tokens were drafted.
            self.decisions.choose(look_ups)
        answer(look_ups, self.stats)
        if samples:
            self._read_sources(look_ups)

    def _read_sources(self, look_ups: Sequence[LookUp]) -> None:
        """Read what the proposals were sampled from; without it, they are verified as certain."""
        client, _ = self._connected()
        try:
            sources = read_sources(look_ups, client.published)
        except ValueError as error:
            self.sources.clear()
            self._nonsense = str(error)
            return
        if sources is not None:
            self.sources.append(sources)

    def _propose_later(
        self, waited: list[LookUp], batch: Batch, began: float, samples: bool
    ) -> bool:
        """Wait for more of some requests' trunks, then answer these; False in a new epoch."""
        client, notices = self._connected()
        if not self._waiting.wait(waited, batch, client, began):
            return False
        self._answer(waited, samples)
        self._waiting.prolong(waited, batch)
        client.send([notices.proposed(waited)])
        return True

    def _keep_up(self, batch: Batch) -> None:
        """Tell the draft the texts, and that nothing is proposed."""
        client, notices = self._connected()
        look_ups, unknown = choose(batch, self.requests, self.depth, self.stats)
        for each in look_ups:
            each.request.proposed, each.request.verifying = [], 0
            each.request.origin = None
            each.request.look_ups += 1
        messages = self._announce_again(unknown, batch)
        if look_ups:
            messages.append(notices.verified(look_ups, 0, speculate=False))
        client.send(messages)

    def _measure_verification(self, look_ups: list[LookUp], now: float) -> int:
        """Microseconds since the last proposal; 0 if that was no usual verification: there was a
        prefill in it, or no request has been decoding."""
        going_on = any(each.request.look_ups for each in look_ups)
        if self._proposed_at is None or not going_on:
            return 0
        seconds = now - self._proposed_at
        self.stats.verify_seconds += seconds
        self.stats.verify_intervals += 1
        self.stats.recent["verify_seconds"].add(seconds)
        return 0 if self._prefills else int(seconds * 1e6)

    def _announce_again(self, rows: list[int], batch: Batch) -> list[ToDraft]:
        """Announce the requests that the new epoch lacks, if the draft can follow them."""
        _, notices = self._connected()
        messages: list[ToDraft] = []
        for row in rows:
            text = batch.texts[row, : batch.lengths[row]]
            running = self._describe(batch.req_ids[row], text)
            if running is not None:
                self.stats.missed("resync", 1)
                messages += notices.announced_again(running)
        return messages
