"""What the proposer's decisions learn from rounds, and what they decide by it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_ssd.core.stats import Stats
from vllm_ssd.core.switch import Switch
from vllm_ssd.core.tree import Below, Where
from vllm_ssd.target.decisions import Decisions
from vllm_ssd.target.lookup import Batch, LookUp
from vllm_ssd.target.pace import Pace
from vllm_ssd.target.requests import RequestTable, Tracked

DEPTH = 4
TEXTS = np.zeros((0, 0), np.int32)


class Engine:
    """A target in simulated time: steps of a base time and a time for each drafted token."""

    def __init__(self, requests: int, plain: float, verify: float, each: float) -> None:
        self.table, self.pace, self.stats = RequestTable(1000), Pace(), Stats()
        self.decisions = Decisions(self.table, self.pace, self.stats)
        self.requests = [Tracked(handle, 10, 1000) for handle in range(requests)]
        self.plain, self.verify, self.each = plain, verify, each
        self.chances = [0.9, 0.8, 0.5, 0.2]
        self.acceptance = 0.7
        self.chance = np.random.default_rng(0)
        self.now = 0.0
        self.proposed_at: float | None = None
        self.on = False

    def step(self, prefill: int = 0, pause: float = 0.0) -> list[int]:
        """One step and the proposal after it; how many tokens of each request are verified next."""
        names = [str(request.handle) for request in self.requests]
        drafts = {
            name: [0] * request.verifying
            for name, request in zip(names, self.requests, strict=True)
            if request.verifying
        }
        counts = {name: 1 + len(drafts.get(name, [])) for name in names}
        counts[names[0]] += prefill
        schedule: Any = SimpleNamespace(
            num_scheduled_tokens=counts,
            scheduled_spec_decode_tokens=drafts,
            scheduled_new_reqs=[],
        )
        self.decisions.take_in()
        self.pace.scheduled(schedule)
        drafted = sum(map(len, drafts.values()))
        seconds = self.verify + self.each * drafted if drafted else self.plain
        self.now += seconds * self.chance.normal(1.0, 0.02) + pause + 1e-3 * prefill
        sampled = [[0] * (1 + self._accepted(request.verifying)) for request in self.requests]
        batch = Batch(names, sampled, [20] * len(names), TEXTS)
        self.on = self.decisions.speculates(batch, self.now, self.proposed_at)
        look_ups = [
            LookUp(row, request, tokens, 20, DEPTH, self._below())
            for row, (request, tokens) in enumerate(zip(self.requests, sampled, strict=True))
        ]
        if self.on:
            self.decisions.begin(look_ups)
            self.decisions.choose(look_ups)
        for each in look_ups:
            each.request.verifying = min(each.chosen, DEPTH) if self.on else 0
        self.now += 1e-4
        self.proposed_at = self.now
        return [request.verifying for request in self.requests]

    def _below(self) -> Below:
        return Below(Where.FOUND, 0, [7] * DEPTH, False, list(self.chances))

    def _accepted(self, verified: int) -> int:
        wrong = self.chance.random(verified) > self.acceptance
        return int(wrong.argmax()) if wrong.any() else verified


@pytest.mark.parametrize("requests", [1, 8])
def test_the_times_of_steps_are_learned(requests: int) -> None:
    engine = Engine(requests, 0.030, 0.032, 0.001)
    for number in range(300):
        engine.step()
        if number % 9 == 0:
            for request in engine.requests:  # nothing was found
                request.verifying = 0
    forecast = engine.pace.forecast(requests)
    assert forecast.plain == pytest.approx(0.030, rel=0.1)
    assert forecast.of(4 * requests) == pytest.approx(0.032 + 0.004 * requests, rel=0.1)


def test_only_tokens_that_pay_are_verified() -> None:
    cheap, dear = Engine(4, 0.030, 0.030, 1e-5), Engine(4, 0.030, 0.030, 0.004)
    for engine in (cheap, dear):
        for _ in range(300):
            engine.step()
    assert sum(cheap.step()) == 16
    assert 0 < np.mean([sum(dear.step()) for _ in range(20)]) < 12
    assert dear.stats.tokens_chosen < 0.8 * dear.stats.tokens_found
    # Now and then everything is verified, to see whether it has become cheaper.
    assert 0 < dear.stats.rounds_full < 30


def test_chances_that_do_not_come_true_are_corrected() -> None:
    engine = Engine(2, 0.030, 0.030, 0.004)
    engine.acceptance = 0.1
    engine.chances = [0.9] * DEPTH
    first = sum(engine.step())
    for _ in range(400):
        engine.step()
    last = [sum(engine.step()) for _ in range(20)]
    assert np.median(last) < first


@pytest.mark.parametrize("requests", [1, 16])
def test_speculation_that_does_not_pay_goes_off(requests: int) -> None:
    engine = Engine(requests, 0.030, 0.080, 0.0)
    engine.acceptance = 0.05
    engine.chances = [0.99] * DEPTH  # the draft is sure, and wrong
    ways = [bool(engine.step()) and engine.on for _ in range(2000)]
    # Once it is known that nothing pays, it does not matter which way nothing is verified.
    verified = engine.stats.tokens_chosen / max(1, engine.stats.tokens_found)
    assert not ways[-1] or verified < 0.05
    assert engine.now < 2000 * 0.030 * 1.05


def test_speculation_that_pays_stays_on() -> None:
    engine = Engine(4, 0.030, 0.033, 0.0005)
    for _ in range(2000):
        engine.step()
    assert engine.decisions.as_dict()["speculates_at_4"]
    assert engine.stats.rounds_off < 40
    assert engine.stats.probe_seconds < 0.02 * engine.now


def test_steps_with_prefill_and_pauses_do_not_count() -> None:
    engine = Engine(2, 0.030, 0.032, 0.001)
    for number in range(300):
        engine.step(prefill=50 * (number % 3 == 0), pause=1.0 * (number % 50 == 25))
    assert engine.pace.forecast(2).of(8) == pytest.approx(0.040, rel=0.15)


def test_a_round_without_draft_says_nothing() -> None:
    engine = Engine(2, 0.030, 0.032, 0.001)
    for _ in range(20):
        engine.step()
    engine.decisions.interrupted()
    engine.now += 100.0
    engine.step()
    engine.decisions.take_in()
    assert engine.pace.rate > 50.0


def test_unstated_chances_take_what_is_usual() -> None:
    engine = Engine(1, 0.030, 0.030, 0.003)
    engine.chances = []
    engine.acceptance = 0.95
    counts = [engine.step()[0] for _ in range(600)]
    assert counts[0] == DEPTH  # no time is known yet
    engine.acceptance = 0.02
    later = [engine.step()[0] for _ in range(1500)]
    assert np.mean(later[-200:]) < np.mean(counts[-200:])


class Off(Decisions):
    def decide(self, switch: Switch) -> bool:
        return False


def test_rounds_off_are_counted() -> None:
    engine = Engine(2, 0.030, 0.032, 0.001)
    engine.decisions = Off(engine.table, engine.pace, engine.stats)
    for _ in range(10):
        assert engine.step() == [0, 0]
    assert engine.stats.rounds_off == 10
