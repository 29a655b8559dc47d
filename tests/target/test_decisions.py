"""What the proposer's decisions learn from rounds, and what they decide by it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_ssd.core.stats import Stats
from vllm_ssd.core.switch import Switch
from vllm_ssd.core.tree import Below, Where
from vllm_ssd.target.decisions import Decisions
from vllm_ssd.target.lookup import Batch, LookUp
from vllm_ssd.target.pace import Pace
from vllm_ssd.target.requests import RequestTable, Tracked
from vllm_ssd.target.steps import Decodes

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
        self.slower = 1.0
        """So many times as long is a step while the draft is at work."""
        self.depth, self.of_text = DEPTH, 0
        self.chance = np.random.default_rng(0)
        self.now = 0.0
        self.proposed_at: float | None = None
        self.on = False

    def step(self, prefill: int = 0, pause: float = 0.0) -> list[int]:
        """One step and the proposal after it; how many tokens of each request are verified next."""
        names = [str(request.handle) for request in self.requests]
        drafted = sum(request.verifying for request in self.requests)
        self.decisions.take_in()
        self.pace.scheduled(None if prefill else Decodes(len(self.requests), drafted))
        seconds = self.verify + self.each * drafted if drafted else self.plain
        seconds *= self.slower if self.on else 1.0
        self.now += seconds * self.chance.normal(1.0, 0.02) + pause + 1e-3 * prefill
        sampled = [[0] * (1 + self._accepted(request.verifying)) for request in self.requests]
        batch = Batch(names, sampled, [20] * len(names), TEXTS)
        self.on = self.decisions.speculates(batch, self.now, self.proposed_at)
        look_ups = [
            LookUp(row, request, tokens, 20, self.depth, self._below())
            for row, (request, tokens) in enumerate(zip(self.requests, sampled, strict=True))
        ]
        if self.on:
            self.decisions.begin(look_ups)
            self.decisions.choose(look_ups)
        for each in look_ups:
            found = min(each.chosen, len(each.below.drafted))
            each.request.verifying = (found + self.of_text) if self.on else 0
        self.now += 1e-4
        self.proposed_at = self.now
        return [request.verifying for request in self.requests]

    def _below(self) -> Below:
        return Below(Where.FOUND, 0, [7] * len(self.chances), False, list(self.chances))

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
    forecast = engine.pace.times.forecast(requests)
    assert forecast.plain == pytest.approx(0.030, rel=0.1)
    assert forecast.of(4 * requests) == pytest.approx(0.032 + 0.004 * requests, rel=0.1)


def test_only_tokens_that_pay_are_verified() -> None:
    cheap, dear = Engine(4, 0.030, 0.030, 1e-5), Engine(4, 0.030, 0.030, 0.004)
    for engine in (cheap, dear):
        for _ in range(1000):
            engine.step()
    assert np.mean([sum(cheap.step()) for _ in range(20)]) > 15
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
    assert engine.pace.times.forecast(2).of(8) == pytest.approx(0.040, rel=0.15)


def test_the_rate_follows_the_number_of_requests_at_once() -> None:
    engine, alone = (Engine(count, 0.030, 0.032, 0.001) for count in (16, 1))
    all_of_them = engine.requests
    for _ in range(100):
        engine.requests = all_of_them
        engine.step()
        alone.step()
    # No step of one has been seen here: only the slope says what it takes.
    engine.requests = all_of_them[:1]
    for _ in range(3):
        engine.step()
    assert engine.pace.rate == pytest.approx(alone.pace.rate, rel=0.4)


def test_a_pause_counts_as_a_few_rounds() -> None:
    pace = Pace()
    for _ in range(20):
        assert pace.observe(2, 0.030) == 0.030
    assert pace.observe(2, 5.0) == pytest.approx(0.120)


def test_a_round_without_draft_says_nothing() -> None:
    engine = Engine(2, 0.030, 0.032, 0.001)
    for _ in range(20):
        engine.step()
    engine.decisions.interrupted()
    engine.now += 100.0
    engine.step()
    engine.decisions.take_in()
    assert engine.pace.rate > 50.0


@pytest.mark.parametrize("requests", [1, 8])
@pytest.mark.parametrize(("acceptance", "pays"), [(0.28, False), (0.47, True)])
def test_what_the_draft_takes_from_the_steps_does_not_hide_whether_it_pays(
    requests: int, acceptance: float, pays: bool
) -> None:
    """Steps take 1.5 times as long while speculating: that loses 7 %, or gains 20 %."""
    on = []
    for seed in range(3):
        engine = Engine(requests, 0.030, 0.030, 1e-5)
        engine.chance = np.random.default_rng(seed)
        engine.slower, engine.acceptance = 1.5, acceptance
        engine.chances = [acceptance] * DEPTH
        on += [bool(engine.step()) and engine.on for _ in range(3000)][1000:]
    assert (np.mean(on) > 0.9) if pays else (np.mean(on) < 0.1)


@pytest.mark.parametrize("requests", [1, 4, 16])
def test_a_draft_that_becomes_better_is_found_out(requests: int) -> None:
    engine = Engine(requests, 0.030, 0.030, 0.004 / requests)
    engine.decisions = AlwaysOn(engine.table, engine.pace, engine.stats)
    engine.chances, engine.acceptance = [0.9] * DEPTH, 0.02
    bad = [np.mean(engine.step()) for _ in range(2000)]
    assert np.mean(bad[-500:]) < 0.5
    engine.acceptance = 0.9
    better = [np.mean(engine.step()) for _ in range(2500)]
    assert np.mean(better[-500:]) > 0.9 * DEPTH


def test_trying_costs_less_than_a_hundredth() -> None:
    """All ways of trying what does not pay together, against plain decoding."""
    engine = Engine(8, 0.030, 0.040, 0.004)
    engine.chances, engine.acceptance = [0.5] * DEPTH, 0.05
    for _ in range(1000):
        engine.step()
    began = engine.now
    for _ in range(6000):
        engine.step()
    assert engine.now - began < 6000 * (0.030 + 1e-4) * 1.01


@pytest.mark.parametrize(("depth", "chances"), [(1, [0.9]), (DEPTH, [0.9])])
def test_nothing_is_lost_where_one_token_is_found(depth: int, chances: list[float]) -> None:
    engine = Engine(2, 0.030, 0.030, 0.001)
    engine.depth, engine.chances = depth, chances
    assert all(engine.step() == [engine.on] * 2 for _ in range(500))
    assert engine.stats.tokens_chosen == engine.stats.tokens_found > 500


def test_asking_for_figures_changes_nothing() -> None:
    asked, left = Engine(4, 0.030, 0.032, 0.002), Engine(4, 0.030, 0.032, 0.002)
    for number in range(600):
        if number % 3 == 0:
            asked.decisions.as_dict()
        assert asked.step() == left.step()


def test_a_batch_is_sampled_or_greedy_by_more_than_a_bare_majority() -> None:
    engine = Engine(10, 0.030, 0.032, 0.001)
    ways = []
    for sampled in (0, 5, 6, 7, 5, 4, 3, 5, 6):
        engine.table.forget_all()
        for handle in range(10):
            params = SimpleNamespace(
                temperature=float(handle < sampled),
                max_tokens=100,
                min_tokens=0,
                stop_token_ids=[],
                eos_token_id=None,
            )
            engine.table.announce(str(handle), np.zeros(10, np.int32), 10, params)
        engine.step()
        ways.append(engine.decisions.sampled)
    assert ways == [False, False, False, True, True, False, False, False, False]


def test_tokens_from_the_text_do_not_keep_a_proposal_from_being_learned_from() -> None:
    engine = Engine(1, 0.030, 0.030, 0.001)
    engine.decisions = AlwaysOn(engine.table, engine.pace, engine.stats)
    engine.chances, engine.acceptance, engine.of_text = [0.9, 0.9], 0.0, 2
    for _ in range(100):
        engine.step()
    assert engine.decisions.lengths[False].correction.of(0.9) < 0.4


@pytest.mark.parametrize("once", [0.0, 0.02])
def test_waiting_does_not_decide_whether_what_was_found_before_is_verified(once: float) -> None:
    """Whether the target waits depends on later chances, and these on which token was sampled."""
    engine = Engine(3, 0.030, 0.030 + once, 0.001)
    for number in range(400):
        engine.step()
        look_ups = [
            LookUp(row, request, [0], 20, DEPTH, engine._below())
            for row, request in enumerate(engine.requests)
        ]
        look_ups[1].below = Below(Where.FOUND, 0, [], False, [])
        engine.decisions.begin(look_ups)
        engine.decisions.choose([look_ups[0], look_ups[2]])
        at_once = look_ups[0].chosen
        for each in look_ups[:2]:
            each.before = each.below
        look_ups[1].below = engine._below()
        engine.decisions.choose(look_ups[:2])
        assert look_ups[0].chosen == at_once, number


class AlwaysOn(Decisions):
    def decide(self, switch: Switch) -> bool:
        return True


class Off(Decisions):
    def decide(self, switch: Switch) -> bool:
        return False


def test_rounds_off_are_counted() -> None:
    engine = Engine(2, 0.030, 0.032, 0.001)
    engine.decisions = Off(engine.table, engine.pace, engine.stats)
    for _ in range(10):
        assert engine.step() == [0, 0]
    assert engine.stats.rounds_off == 10
