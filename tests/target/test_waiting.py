"""What waits cost, and that they begin again, in simulated time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_ssd.config import SSDConfig
from vllm_ssd.core.stats import Stats
from vllm_ssd.core.tree import Below, Where
from vllm_ssd.target import waiting
from vllm_ssd.target.lookup import Batch, LookUp
from vllm_ssd.target.pace import Pace
from vllm_ssd.target.requests import Tracked

DEPTH = 4
STEP = 0.030
BATCH = Batch(["0"], [[1]], [20], np.zeros((1, 100), np.int32))


class Draft:
    """A draft that drafts a token every ``each`` seconds while it is waited for."""

    def __init__(self, each: float) -> None:
        self.each = each
        self.now = self.since = 0.0
        self.epoch = self.received = 0
        self.withdrawn: set[int] = set()
        self.trees: dict[int, Any] = {}
        self.published: Any = SimpleNamespace(withdrawn=self.withdrawn, cache=self)

    def poll(self, most: float) -> None:
        come = math.floor((self.now - self.since) / self.each + 1e-6)
        until_next = self.since + (come + 1) * self.each - self.now
        self.now += min(most, until_next) + 1e-6
        self.received += 1

    def look_up(self, handles: list[int], _: object) -> list[Below]:
        come = min(DEPTH, int((self.now - self.since) / self.each))
        return [Below(Where.FOUND, 0, [7] * come, False, [0.6] * come) for _ in handles]


class Target:
    """A target that finds nothing at once."""

    def __init__(self, draft: Draft, acceptance: float) -> None:
        self.draft, self.acceptance = draft, acceptance
        self.stats, self.pace = Stats(), Pace()
        config = SSDConfig.parse({"model": "d", "num_speculative_tokens": DEPTH})
        self.waiting = waiting.Waiting(config, self.stats, self.pace)
        self.chance = np.random.default_rng(0)

    def round(self) -> float:
        """One round; how long it waited."""
        draft = self.draft
        client: Any = draft
        began = draft.since = draft.now
        below = Below(Where.FOUND, 0, [], False, [])
        look_ups = [LookUp(0, Tracked(0, 19, 1000), [1], 20, DEPTH, below)]
        tokens = 1
        if chosen := self.waiting.begin(look_ups, client):
            assert self.waiting.wait(chosen, BATCH, client, began)
            tokens += self._verify(len(chosen[0].below.drafted))
        waited = draft.now - began
        draft.now += STEP
        self.pace.observe(tokens, draft.now - began)
        return waited

    def _verify(self, drafted: int) -> int:
        wrong = self.chance.random(drafted) > self.acceptance
        right = int(wrong.argmax()) if wrong.any() else drafted
        self.stats.waited_accepted += right
        self.stats.waited_rejections += right < drafted
        return right


@pytest.fixture
def draft(monkeypatch: pytest.MonkeyPatch) -> Draft:
    draft = Draft(1.0)
    clock = SimpleNamespace(perf_counter=lambda: draft.now)
    monkeypatch.setattr(waiting, "time", clock)
    return draft


def test_waits_in_vain_cost_little_and_are_taken_up_when_the_draft_is_faster(draft: Draft) -> None:
    target = Target(draft, 0.6)
    for _ in range(300):
        target.round()
    waits = [target.round() for _ in range(5000)]
    assert 0.0 < sum(waits) < 0.002 * 5000 * STEP
    draft.each = 0.002
    for _ in range(2000):
        target.round()
    assert np.mean([target.round() > 0.0 for _ in range(200)]) > 0.9


def test_tokens_that_are_not_accepted_are_not_waited_for_until_they_are(draft: Draft) -> None:
    draft.each = 0.008
    target = Target(draft, 0.02)
    for _ in range(500):
        target.round()
    waits = [target.round() for _ in range(5000)]
    assert 0.0 < sum(waits) < 0.002 * 5000 * STEP
    target.acceptance = 0.9
    for _ in range(12_000):
        target.round()
    assert np.mean([target.round() > 0.0 for _ in range(200)]) > 0.9


def test_each_text_is_prolonged_as_far_as_its_own_repetitions_go() -> None:
    target = Target(Draft(0.005), 0.5)
    for step in range(200):
        drafted = step // 2 % 5
        target.pace.times.observe(2, drafted, STEP + 0.002 * drafted)
        target.pace.observe(4, STEP)
    target.pace.expect(2)
    assert 0.1 < target.pace.price < 0.4
    repeats, does_not = (
        LookUp(row, Tracked(row, 20, 100), [1], 20, DEPTH, Below(Where.FOUND, 0, [], False, []))
        for row in range(2)
    )
    repeats.request.of_text.observe(50, 0)
    does_not.request.of_text.observe(0, 20)
    assert target.waiting._worth_prolonging([repeats, does_not], [DEPTH, DEPTH]) == [DEPTH, 0]
