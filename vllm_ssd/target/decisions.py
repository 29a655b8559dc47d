"""What to verify of what was found, and whether to speculate at all: by what was measured.

What a round has shown is taken in with the next step's notice, off the critical path of a proposal:
on a GPU that comes after the step's launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from vllm_ssd.core.credit import Credit
from vllm_ssd.core.lengths import Lengths, Verified
from vllm_ssd.core.stats import Stats
from vllm_ssd.core.switch import Switch, Switches
from vllm_ssd.target.lookup import Batch, LookUp
from vllm_ssd.target.pace import Pace
from vllm_ssd.target.requests import RequestTable
from vllm_ssd.target.steps import Decodes

_TRIALS_SHARE = 0.002
"""Of the time, what it may cost to verify other numbers of tokens; with probes and waits below
1 %."""
_TRIES_EVERY = 32
"""Rounds from one of these trials to the next at least, so that usual rounds stay the rule."""
_MAY_TRY_EVERY = 8
"""The same while little is known. Not in the next round: what a trial has cost depends on tokens
that may be found again then."""
_LEARNS_EVERY = 8
"""One round in so many is learned from with ``_MANY`` requests: that takes microseconds each."""
_MANY = 5


class _Round(NamedTuple):
    """A round that has ended."""

    step: Decodes
    switch: Switch
    size: int
    """The batch size that the switch compares for."""
    on: bool
    """Whether it speculated."""
    tokens: int
    seconds: float
    step_seconds: float
    """Without look-ups and waits."""


class _Watched(NamedTuple):
    """A proposal to learn from."""

    lengths: Lengths
    """What has chosen its length."""
    stated: Sequence[float]
    """What the draft stated for its tokens."""
    chosen: int
    """How many of them would have been verified if that had not been a trial."""


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
        self.lengths = {False: Lengths(), True: Lengths()}
        """For greedy batches and for those with a temperature."""
        self._switch: Switch | None = None
        """That of the round under way."""
        self._on = True
        """Whether the round under way speculates."""
        self.sampled = False
        """Whether most requests of the batch have a temperature."""
        self._began: float | None = None
        """When the round under way began."""
        self._ended: _Round | None = None
        """The round before it, not taken in yet."""
        self._watched: dict[int, _Watched] = {}
        """Proposals of the round under way, by the request's handle."""
        self._verified: list[tuple[Lengths, Verified]] = []
        """Such proposals, verified, and what has chosen their lengths."""
        self._verifies = True
        """Whether tokens found at once are verified in the round under way."""
        self._depth = 0
        """The most tokens that a request can use in that round."""
        self._credit = Credit(_TRIALS_SHARE)
        self._full = self._half = False
        """Whether this round tries all tokens, or half as many."""
        self._cost = 0.0
        """Seconds that trying all tokens takes longer."""
        self._rounds = self._tried_at = self._trials = 0

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
            size = self._switches.size
            self._ended = _Round(step, before, size, self._on, tokens, seconds, step_seconds)
        self._began = began
        if requests and requests != self._pace.requests:
            self._pace.expect(requests)
        # A majority that hardly is one does not change sides with every request.
        majority = 0.4 if self.sampled else 0.6
        self.sampled = self._requests.count_sampled(batch.req_ids) > majority * requests
        switch = self._switches.of(max(1, requests), self.sampled)
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
        verified, self._verified = self._verified, []
        if verified:
            for lengths in self.lengths.values():
                if its := [proposal for chosen_by, proposal in verified if chosen_by is lengths]:
                    lengths.observe(its)

    def _take_round(self, ended: _Round) -> None:
        pace, times, switch = self._pace, self._pace.times, ended.switch
        requests = ended.step.requests
        seconds = pace.observe(ended.tokens, ended.seconds)
        if ended.on:
            times.observe(requests, ended.step.drafted, ended.step_seconds)
        elif not ended.step.drafted:
            times.observe_quiet(requests, ended.step_seconds)
        if ended.on != switch.usually:
            self._stats.rounds_probing += 1
            self._stats.probe_seconds += seconds
        # As if the batch always had the same size. What such steps take differs between the two
        # ways, so only the ratio of two of these times counts.
        usual = times.usual(ended.size)
        shape = times.usual(requests) / usual if usual else 1.0
        plain = times.plain(requests)
        switch.observe(ended.tokens / requests * shape, seconds, shape / plain if plain else 0.0)
        pace.expect(requests)

    # ---- how many tokens

    def begin(self, look_ups: Sequence[LookUp]) -> None:
        """A round that speculates: note how the last proposals ended, decide what all depends on.

        Args:
            look_ups: all of the batch, looked up.
        """
        pace = self._pace
        gained = self._note_accepted(look_ups) if self._watched else 0
        again = False
        if self._full and pace.rate:
            lost = self._cost - gained / pace.rate
            again = lost < 0.0  # perhaps the draft has become better
            self._credit.spend(pace.clock, max(0.0, lost))
        self._full = self._half = False
        self._cost = 0.0
        self._rounds += 1
        # By what is known before the round: no chance of a token has a part in it.
        due = again or self._rounds - self._tried_at >= _TRIES_EVERY
        vague = self._rounds % _MAY_TRY_EVERY == 0 and pace.times.vague(pace.requests)
        if (due or vague) and pace.rate and self._credit.ready(pace.clock):
            if due:
                self._tried_at = self._rounds
                self._trials += not again
                self._full = again or bool(self._trials % 2)
            self._half = not self._full
            self._stats.rounds_full += self._full
        switch = self._switch
        # A probe tries to verify: else it would say nothing of speculation.
        probes = switch is None or switch.on != switch.usually
        self._depth = max([each.wanted for each in look_ups], default=0)
        self._verifies = probes or self._pays([each.below.chances for each in look_ups])

    def _pays(self, stated: Sequence[Sequence[float]]) -> bool:
        """Whether a verification of tokens with such chances usually pays."""
        lengths, pace = self.lengths[self.sampled], self._pace
        firsts = [chances[0] for chances in stated if chances]
        return lengths.pays(firsts, pace.price, pace.once, self._depth)

    def choose(self, look_ups: Sequence[LookUp]) -> None:
        """Set how many of the tokens found are verified, for each request.

        Args:
            look_ups: all of the batch; or first some, then those that were waited for.
        """
        lengths, pace = self.lengths[self.sampled], self._pace
        stated = [each.below.chances[: max(0, each.wanted)] for each in look_ups]
        chosen = lengths.choose(stated, pace.price)
        # Whether a request was waited for may depend on the chances of all its tokens, so it must
        # not decide about the tokens found before.
        late = [each.before is not None and not each.before.drafted for each in look_ups]
        if not self._verifies:
            pays = self._pays([of for of, its in zip(stated, late, strict=True) if its])
            chosen = [count * (its and pays) for count, its in zip(chosen, late, strict=True)]
        counts = chosen
        if self._full:
            counts = [len(of) for of in stated]
            if more := sum(counts) - sum(chosen):
                before = pace.forecast.base if any(chosen) else pace.forecast.plain
                self._cost += pace.forecast.of(more) - before
        elif self._half:
            half = (self._depth + 1) // 2
            counts = [
                count if its else min(count, half) for count, its in zip(chosen, late, strict=True)
            ]
            if fewer := sum(chosen) - sum(counts):
                self._credit.spend(pace.clock, fewer * lengths.onward.chance / pace.rate)
        total = sum(counts)
        for each, count in zip(look_ups, counts, strict=True):
            each.chosen = count
        self._stats.tokens_found += sum(map(len, stated))
        self._stats.tokens_chosen += total
        if len(look_ups) < _MANY or self._full or self._rounds % _LEARNS_EVERY == 0:
            for each, of, count, usual in zip(look_ups, stated, counts, chosen, strict=True):
                if count:
                    self._watched[each.request.handle] = _Watched(lengths, of[:count], usual)

    def _note_accepted(self, look_ups: Sequence[LookUp]) -> int:
        """Keep what was accepted of the last proposals.

        Returns:
            How many of the tokens accepted were verified only because that was a trial.
        """
        gained = 0
        for each in look_ups:
            watched = self._watched.get(each.request.handle)
            verified, right = each.request.verifying, len(each.confirmed) - 1
            if watched is not None and 0 <= right <= verified:
                stated = watched.stated[:verified]  # without tokens from the text
                right = min(right, len(stated))
                self._verified.append((watched.lengths, Verified(stated, right)))
                gained += max(0, right - watched.chosen)
        self._watched = {}
        return gained

    # ---- for people

    def as_dict(self) -> dict[str, float]:
        """What is believed at each level of the batch size, named by its largest batch."""
        result: dict[str, float] = {"engine_tokens_per_second": self._pace.rate}
        for (sampled, level), switch in sorted(self._switches.by_level.items()):
            size = 1 << level
            name = f"{size}_sampled" if sampled else f"{size}"
            forecast = self._pace.times.forecast(size)
            result[f"speculates_at_{name}"] = float(switch.usually)
            result[f"gain_at_{name}"] = math.exp(switch.belief.mean) - 1.0
            result[f"gain_error_at_{name}"] = math.sqrt(switch.belief.variance)
            result[f"probes_at_{name}"] = switch.probes
            result[f"changes_at_{name}"] = switch.changes
            result[f"plain_seconds_at_{size}"] = forecast.plain
            result[f"verify_seconds_at_{size}"] = forecast.base
            result[f"seconds_per_drafted_token_at_{size}"] = forecast.each
        return result
