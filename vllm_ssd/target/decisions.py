"""What to verify of what was found, and whether to speculate at all: by what was measured.

What a round has shown is taken in with the next step's notice, off the critical path of a proposal:
on a GPU that comes after the step's launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from vllm_ssd.core.lengths import Lengths
from vllm_ssd.core.stats import Stats
from vllm_ssd.core.step_times import Forecast
from vllm_ssd.core.switch import Switch, Switches
from vllm_ssd.target.lookup import Batch, LookUp
from vllm_ssd.target.pace import Pace, Step
from vllm_ssd.target.requests import RequestTable

_LEARNS_MORE = 256
"""Every so many rounds all that was found is verified, to learn what that takes."""
_MANY = 4
_LEARNS_EVERY = 8
"""With more requests than ``_MANY``, one round in so many is enough to learn from."""


class _Round(NamedTuple):
    """A round that has ended."""

    step: Step
    switch: Switch
    on: bool
    """Whether it speculated."""
    tokens: int
    seconds: float
    step_seconds: float
    """Without look-ups and waits."""


class _Chosen(NamedTuple):
    """Tokens to verify."""

    tokens: int
    expected: float
    """How many of them will be accepted."""


class _Watched(NamedTuple):
    """A proposal to learn from."""

    stated: Sequence[float]
    """The chance that each token is accepted if those before it are."""
    known: int
    """For so many of them the draft states it; for the others it is what is usual."""


class Decisions:
    """Decides, for each batch, whether to speculate and how many drafted tokens to verify.

    Args:
        requests: those announced to the draft.
        pace: the measured speed of the target.
        stats: counters to keep.
    """

    def __init__(self, requests: RequestTable, pace: Pace, stats: Stats) -> None:
        self._requests = requests
        self._pace = pace
        self._stats = stats
        self._switches = Switches()
        self._lengths = {False: Lengths(), True: Lengths()}
        """For greedy batches and for those with a temperature."""
        self._switch: Switch | None = None
        """That of the round under way."""
        self._on = True
        """Whether the round under way speculates."""
        self._sampled = False
        """Whether most requests of the batch have a temperature."""
        self._any_sampled = False
        """Whether any request of it has one: drafts may be sampled."""
        self._batch = 1
        """Requests of the round under way."""
        self._began: float | None = None
        """When it began."""
        self._ended: _Round | None = None
        """The round before it, not taken in yet."""
        self._watched: dict[int, _Watched] = {}
        """Proposals of the round under way, by the request's handle."""
        self._verified: list[tuple[_Watched, int, int]] = []
        """Such proposals, how many of their tokens were verified and how many accepted."""
        self._forecast, self._forecast_for = Forecast(0.0, 0.0, 0.0), 0
        """What the next step takes, with so many requests."""
        self._before = _Chosen(0, 0.0)
        """What has been chosen for other requests of this round."""
        self._rounds = 0

    # ---- on or off

    def speculates(self, batch: Batch, began: float, proposed_at: float | None) -> bool:
        """Decide whether the next round speculates.

        Args:
            batch: what the verification yielded.
            began: the time now.
            proposed_at: when the last proposal was made.
        """
        requests = len(batch.sampled) - batch.sampled.count([])
        tokens = sum(map(len, batch.sampled))
        step, before = self._pace.take_step(), self._switch
        if step is None or before is None or self._began is None or proposed_at is None:
            pass  # the first round, one with prefill, or without a draft
        elif step.requests == requests:
            seconds, step_seconds = began - self._began, began - proposed_at
            self._ended = _Round(step, before, self._on, tokens, seconds, step_seconds)
        self._began, self._batch = began, max(1, requests)
        with_temperature = self._requests.count_sampled(batch.req_ids)
        self._sampled = 2 * with_temperature > requests
        self._any_sampled = with_temperature > 0
        switch = self._switches.of(self._batch, self._sampled)
        if switch is not before:
            if before is not None:
                before.leave()
            switch.enter(self._on)
            self._switch = switch
        self._on = self.decide(switch)
        if not self._on:
            self._stats.rounds_off += 1
            self._watched.clear()
        return self._on

    def decide(self, switch: Switch) -> bool:
        """Whether the next round speculates."""
        return switch.on

    def interrupted(self) -> None:
        """The round under way says nothing: there is no draft, or there was an error."""
        self._began = None
        self._watched.clear()

    def take_in(self) -> None:
        """Learn from the round that has ended."""
        ended, self._ended = self._ended, None
        if ended is not None:
            self._take_round(ended)
            self._forecast_for = ended.step.requests
            self._forecast = self._pace.forecast(self._forecast_for)
        verified, self._verified = self._verified, []
        if verified:
            self._learn(self._lengths[self._sampled], verified)

    def _take_round(self, ended: _Round) -> None:
        pace, switch = self._pace, ended.switch
        requests, seconds = ended.step.requests, ended.seconds
        pace.observe(ended.tokens, seconds)
        if ended.on:
            pace.observe_step(ended.step, ended.step_seconds, seconds)
        elif not ended.step.drafted:
            pace.times.observe_quiet(requests, ended.step_seconds)
        if ended.on != switch.usually:
            self._stats.rounds_probing += 1
            self._stats.probe_seconds += seconds
        # Compared per request, by the time that a step of so many takes: the batch may change.
        usual = pace.times.usual(requests) or 1.0
        plain = pace.times.plain(requests)
        switch.observe(ended.tokens / requests * usual, seconds, usual / plain if plain else 0.0)

    # ---- how many tokens

    def begin(self, look_ups: Sequence[LookUp]) -> None:
        """A round that speculates: note how the last proposals ended."""
        if self._watched:
            self._note_accepted(look_ups)
        self._before = _Chosen(0, 0.0)
        self._rounds += 1

    def choose(self, look_ups: Sequence[LookUp]) -> None:
        """Set how many of the tokens found are verified, for each request.

        Args:
            look_ups: all of the batch; or first some, later others, which come on top of those.
        """
        lengths, pace = self._lengths[self._sampled], self._pace
        stated: list[Sequence[float]] = []
        for each in look_ups:
            chances, count, wanted = each.below.chances, len(each.below.drafted), each.wanted
            if len(chances) < count:
                chances = chances + [lengths.usual] * (count - len(chances))
            stated.append(chances if count <= wanted else chances[: max(0, wanted)])
        batch = max(self._batch, len(look_ups))
        if self._forecast_for != batch:
            self._forecast_for, self._forecast = batch, pace.forecast(batch)
        before, forecast = self._before, self._forecast
        if before.tokens:
            shifted = forecast.of(before.tokens)
            forecast = Forecast(shifted, shifted, forecast.each)
        # Nothing below may depend on which tokens were sampled (core/lengths.py): of the chances
        # of this round only those before a token decide whether it is verified.
        depth = max(each.wanted for each in look_ups) if look_ups else 0
        sampled = depth if self._any_sampled else 0
        chosen = lengths.choose(batch + before.expected, stated, forecast, pace.besides, sampled)
        counts, rate, found = chosen.counts, chosen.rate, sum(map(len, stated))
        if self._rounds % _LEARNS_MORE == 0:
            counts, rate = [len(of) for of in stated], chosen.rate_of_all
            self._stats.rounds_full += 1
        elif self._rounds % 2 and pace.times.vague(batch):
            counts = [min(count, (depth + 1) // 2) for count in counts]
        total = sum(counts)
        expected = rate * (forecast.of(total) + pace.besides) - batch
        self._before = _Chosen(before.tokens + total, max(0.0, expected))
        for each, count in zip(look_ups, counts, strict=True):
            each.chosen = count
        self._stats.tokens_found += found
        self._stats.tokens_chosen += total
        if len(look_ups) <= _MANY or self._rounds % _LEARNS_EVERY == 0:
            for each, of, count in zip(look_ups, stated, counts, strict=True):
                if count:
                    watched = _Watched(of[:count], len(each.below.chances))
                    self._watched[each.request.handle] = watched

    def _note_accepted(self, look_ups: Sequence[LookUp]) -> None:
        """Keep what was accepted of the last proposals."""
        for each in look_ups:
            watched = self._watched.get(each.request.handle)
            verified, right = each.request.verifying, len(each.confirmed) - 1
            if watched is not None and 0 <= right <= verified <= len(watched.stated):
                self._verified.append((watched, verified, right))
        self._watched = {}

    def _learn(self, lengths: Lengths, verified: Sequence[tuple[_Watched, int, int]]) -> None:
        stated: list[Sequence[float]] = []
        accepted: list[int] = []
        for watched, count, right in verified:
            known = min(count, watched.known)
            stated.append(watched.stated[:known])
            accepted.append(min(right, known))
            if count > known <= right:
                lengths.observe_unstated(right - known + (right < count), right - known)
        lengths.observe(stated, accepted)

    # ---- for people

    def as_dict(self) -> dict[str, float]:
        """What is believed at each level of the batch size, named by its largest batch."""
        result: dict[str, float] = {"engine_tokens_per_second": self._pace.rate}
        for (sampled, level), switch in sorted(self._switches.by_level.items()):
            size = 1 << level
            name = f"{size}_sampled" if sampled else f"{size}"
            forecast = self._pace.forecast(size)
            result[f"speculates_at_{name}"] = float(switch.usually)
            result[f"gain_at_{name}"] = math.exp(switch.belief.mean) - 1.0
            result[f"gain_error_at_{name}"] = math.sqrt(switch.belief.variance)
            result[f"probes_at_{name}"] = switch.counts.probes
            result[f"changes_at_{name}"] = switch.counts.changes
            result[f"plain_seconds_at_{size}"] = forecast.plain
            result[f"verify_seconds_at_{size}"] = forecast.base
            result[f"seconds_per_drafted_token_at_{size}"] = forecast.each
        return result
