"""Where a look-up finds nothing, or little: wait for the draft, or search the text, if it pays."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_ssd.config import SSDConfig
from vllm_ssd.core.acceptance import Acceptance
from vllm_ssd.core.credit import Credit
from vllm_ssd.core.stats import Stats
from vllm_ssd.core.tree import Where
from vllm_ssd.core.waiting import Awaited, Delay, gains, patience
from vllm_ssd.target.lookup import Batch, LookUp, growing, lacking, look_up
from vllm_ssd.target.ngram import prolong
from vllm_ssd.target.pace import Pace

if TYPE_CHECKING:
    from vllm_ssd.target.client import DraftClient
    from vllm_ssd.target.published import PublishedTrees

LONGEST = 1.0
"""Seconds; with ``max_wait_ms`` ``"auto"`` no wait takes longer, whatever it would be worth."""
_TRIALS_SHARE = 0.001
"""Of the time, what waits that do not seem to pay may cost, and as much for n-grams: see that of
:mod:`vllm_ssd.target.decisions`."""


class Waiting:
    """Decides what to wait for, waits, and prolongs proposals from the text (``backup``).

    Only what the draft stated before goes into these decisions, never which tokens it drafted.

    Args:
        config: the options.
        stats: counters to keep.
        pace: the measured speed of the engine.
    """

    def __init__(self, config: SSDConfig, stats: Stats, pace: Pace) -> None:
        self._stats = stats
        self._pace = pace
        self._depth = config.num_speculative_tokens
        self._for_trunks = config.backup in ("auto", "draft")
        """Whether requests may be waited for that need more of their trunk."""
        bound = config.max_wait_ms
        self._bound = LONGEST if isinstance(bound, str) else bound * 1e-3
        self._waits_for_branches = not isinstance(bound, str) and bound > 0.0
        self._while_it_pays = config.backup == "auto" or isinstance(bound, str)
        self._for_texts = config.backup in ("auto", "ngram")
        """Whether proposals may be prolonged from the text."""
        self._ngram_always = config.backup == "ngram"
        self.first, self.following = Delay(), Delay()
        """How long the first token of a wait takes, and each one after it."""
        self._acceptance, self._ngram_acceptance = Acceptance(), Acceptance()
        """Of tokens that were waited for: the draft has not foreseen what they follow, and is wrong
        more often than usual. And of those from the text, over all requests."""
        self._counted = (0, 0, 0, 0)
        """The counters when these two were last brought up to date."""
        self._credit, self._ngram_credit = Credit(_TRIALS_SHARE), Credit(_TRIALS_SHARE)
        self._silent_at = -1
        """How many frames of the draft there were when it did not answer within a wait."""

    # ---- found branches that grow

    def for_branches(
        self, look_ups: list[LookUp], batch: Batch, client: DraftClient, began: float
    ) -> bool:
        """With a bound and no other use of waiting: wait for the branches that were hit.

        Args:
            look_ups: those of the batch, looked up.
            batch: the verification.
            client: the draft's.
            began: when ``propose()`` began.

        Returns:
            False if a new epoch has begun: then the next step announces all requests again.
        """
        if self._for_trunks or not self._waits_for_branches:
            return True
        waiting = growing(look_ups, client.published, self._depth)
        if not waiting or client.received == self._silent_at:
            return True
        deadline = began + self._bound
        epoch, received, now = client.epoch, client.received, time.perf_counter()
        since = now
        while waiting and client.epoch == epoch and now < deadline:
            client.poll(deadline - now)
            look_up(waiting, batch, client.published)
            waiting = growing(waiting, client.published, self._depth)
            now = time.perf_counter()
        # What arrived meanwhile may have changed the other requests' trees as well.
        look_up(look_ups, batch, client.published)
        self._count_wait(now - since)
        self._note_silence(client, received)
        return client.epoch == epoch

    # ---- trunks

    def begin(self, short: Sequence[LookUp], client: DraftClient) -> list[LookUp]:
        """Which requests to wait for.

        Args:
            short: those that could use more tokens than were found.
            client: the draft's.
        """
        if not self._for_trunks or self._bound <= 0.0 or client.received == self._silent_at:
            return []
        published = client.published
        chosen = [
            each for each in short if _can_grow(each, published) and _is_ready(each, published)
        ]
        if not self._patience(chosen, self.first)[1]:
            return []
        for each in chosen:
            each.before = each.below
        return chosen

    def wait(self, waited: list[LookUp], batch: Batch, client: DraftClient, began: float) -> bool:
        """Wait for more tokens of the requests chosen; the draft has been told.

        Args:
            waited: those.
            batch: the verification.
            client: the draft's.
            began: when ``propose()`` began.

        Returns:
            As :meth:`for_branches`.
        """
        epoch, received = client.epoch, client.received
        deadline = began + self._bound
        delay, missing = self.first, waited
        now = since = began_waiting = time.perf_counter()
        while missing:
            worth, patience = self._patience(missing, delay)
            if not patience:
                break
            last = min(since + patience, deadline)
            more = False
            while missing and not more and now < last:
                client.poll(min(last - now, 60.0))
                if client.epoch != epoch:
                    break
                held = sum(len(each.below.drafted) for each in missing)
                look_up(missing, batch, client.published)
                more = sum(len(each.below.drafted) for each in missing) > held
                missing = [each for each in missing if _can_grow(each, client.published)]
                now = time.perf_counter()
            if patience > worth:
                # A trial: what comes in time after all costs nothing.
                self._credit.spend(self._pace.clock, max(0.0, now - since - worth * more))
            if not more:
                if missing:
                    delay.missed(now - since)
                    self._stats.waits_in_vain += 1
                break
            delay.came(now - since)
            since, delay = now, self.following
            missing = lacking(missing)
        self._count_wait(time.perf_counter() - began_waiting)
        self._note_silence(client, received)
        return client.epoch == epoch

    def _count_wait(self, seconds: float) -> None:
        self._stats.waits += 1
        self._stats.wait_seconds += seconds
        self._stats.recent["wait_seconds"].add(seconds)

    def _note_silence(self, client: DraftClient, received: int) -> None:
        """A draft that sent nothing during a wait is not waited for until it does."""
        if client.received == received:
            self._silent_at = received

    def _patience(self, short: Sequence[LookUp], delay: Delay) -> tuple[float, float]:
        """For how many seconds the next token of these requests is worth waiting for.

        Returns:
            That, and for how long to wait: 0.0 if it will come later, longer if that is tried.
        """
        if not self._while_it_pays:
            return math.inf, math.inf
        worth = self._worth(short)
        if worth > delay.seconds:
            return worth, worth
        if short and self._credit.ready(self._pace.clock):
            return worth, max(worth, min(delay.seconds, self._pace.round_seconds))
        return worth, 0.0

    def _worth(self, short: Sequence[LookUp]) -> float:
        pace = self._pace
        if not pace.rate or not short:
            return 0.0
        self._learn()
        awaited = Counter(
            Awaited(math.prod(each.below.chances), each.wanted - len(each.below.drafted))
            for each in short
        )
        gained = gains(awaited, self._acceptance.chance, pace.price)
        worth = patience(gained, pace.rate, self.following.seconds)
        if len(short) == pace.requests and not any(each.below.drafted for each in short):
            # Without these tokens the step is a plain one.
            worth -= pace.forecast.base - pace.forecast.plain
        return max(0.0, worth)

    # ---- the text

    def prolong(self, short: Sequence[LookUp], batch: Batch) -> None:
        """Prolong proposals by what followed the same tokens earlier in the text.

        Args:
            short: requests that could use more tokens, answered.
            batch: the verification.
        """
        if not self._for_texts:
            return
        open_ended = [
            each
            for each in short
            if len(each.request.proposed) == len(each.below.drafted) < each.wanted
            and not each.below.ended
        ]
        if not open_ended:
            return
        counts = [each.wanted - len(each.request.proposed) for each in open_ended]
        if not self._ngram_always:
            counts = self._worth_prolonging(open_ended, counts)
        if any(counts):
            chosen = [each for each, count in zip(open_ended, counts, strict=True) if count]
            prolong(chosen, [count for count in counts if count], batch, self._stats)

    def _worth_prolonging(self, look_ups: Sequence[LookUp], most: list[int]) -> list[int]:
        """By how many tokens of its text to prolong each proposal, ``most`` at most."""
        self._learn()
        usual, pace = self._ngram_acceptance.chance, self._pace
        if not pace.price:
            return most
        counts = []
        for each, count in zip(look_ups, most, strict=True):
            chance = each.request.of_text.given(usual)
            # The chance falls by that factor with every token.
            above = math.prod(each.below.chances) * chance / pace.price
            longest = 1 + math.log(above) / -math.log(chance) if above > 1.0 else 0
            counts.append(min(count, int(longest)))
        if not any(counts) and self._ngram_credit.ready(pace.clock):
            counts = [min(count, 1) for count in most]
            self._ngram_credit.spend(pace.clock, pace.forecast.each * sum(counts))
        return counts

    # ---- what is learned

    def _learn(self) -> None:
        """Bring the acceptances up to date with the counters."""
        stats = self._stats
        now = (
            stats.waited_accepted,
            stats.waited_rejections,
            stats.ngram_accepted,
            stats.ngram_rejections,
        )
        if now != self._counted:
            waited, in_vain, of_text, not_of_text = (
                after - before for after, before in zip(now, self._counted, strict=True)
            )
            self._acceptance.observe(waited, in_vain)
            self._ngram_acceptance.observe(of_text, not_of_text)
            self._counted = now


def _can_grow(each: LookUp, published: PublishedTrees) -> bool:
    """Whether the draft will draft more for a request."""
    request, below = each.request, each.below
    if request.handle in published.withdrawn or request.limit - each.length <= 1:
        return False
    return len(below.drafted) < each.wanted and not below.ended


def _is_ready(each: LookUp, published: PublishedTrees) -> bool:
    """Whether the draft has the request's text: before that, nobody knows how long it takes."""
    if each.below.where is Where.FOUND:
        return True
    tree = published.cache.trees.get(each.request.handle)
    return tree is not None and bool(published.cache.length[tree.trunk])
