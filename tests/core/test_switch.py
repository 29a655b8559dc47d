"""Speculation on or off, in simulated time: what is found, what finding out costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from vllm_ssd.core.switch import Switch, Switches

PLAIN = 0.030
"""Seconds of a plain round."""
K = 6
MEAN = 2.0 - 0.5**K
"""Tokens of a request in a round with speculation, on average: each token is right half the time.
They vary from 1 to K + 1."""


@dataclass
class Run:
    """What a run yielded."""

    gained: float
    """Tokens a request."""
    best: float
    """What the better way would have yielded in the same time, in every round."""
    probes: float
    """The part of the difference to it that comes from probes."""
    changes: list[int]
    """The rounds in which the usual way changed."""
    on: bool

    @property
    def regret(self) -> float:
        return 1.0 - self.gained / self.best


def run(
    ratio: Callable[[int], float],
    rounds: int,
    seed: int,
    requests: int = 1,
    switch: Switch | None = None,
    told: bool = True,
) -> Run:
    """Rounds in which speculation is ``ratio`` times as fast as plain decoding.

    Args:
        ratio: by round.
        rounds: how many.
        seed: of the noise.
        requests: of the batch.
        switch: a new one if not given.
        told: whether step times say what plain decoding gains.
    """
    chance = np.random.default_rng(seed)
    switch = switch or Switch()
    result = Run(0.0, 0.0, 0.0, [], True)
    was_on, since = True, 100
    for number in range(rounds):
        on, usually = switch.on, switch.usually
        since = since + 1 if on == was_on else 0
        was_on = on
        tokens, seconds = 1.0, PLAIN
        if on and since >= 2:  # before that, the draft catches up
            tokens = float(np.minimum(chance.geometric(0.5, requests), K + 1).mean())
            seconds = PLAIN * MEAN / ratio(number)
        elif on:
            seconds *= 1.03
        seconds *= max(0.5, chance.normal(1.0, 0.03))
        best = seconds * max(ratio(number), 1.0) / PLAIN
        result.gained += tokens
        result.best += best
        result.probes += (on != usually) * (best - tokens)
        switch.observe(tokens, seconds, 0.97 / PLAIN if told else 0.0)
        if switch.usually != usually:
            result.changes.append(number)
    result.on = switch.usually
    return result


SEEDS = range(6)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("requests", [1, 16])
@pytest.mark.parametrize("ratio", [2.0, 1.3, 1.1, 0.9, 0.7])
def test_the_faster_way_is_found_and_probes_cost_less_than_a_hundredth(
    ratio: float, requests: int, told: bool
) -> None:
    runs = [run(lambda _: ratio, 6000, seed, requests, told=told) for seed in SEEDS]
    # Of a few per cent at batch 1, the noise of one run may hide the sign for a while.
    assert sum(one.on == (ratio > 1.0) for one in runs) >= len(runs) - (requests == 1)
    assert np.mean([one.probes / one.best for one in runs]) < 0.01
    # The trial at the start included.
    assert np.mean([one.regret for one in runs]) < 0.015


@pytest.mark.parametrize("requests", [1, 16])
@pytest.mark.parametrize("ratio", [1.02, 1.0, 0.98])
def test_noise_does_not_flip_it_where_both_are_alike(ratio: float, requests: int) -> None:
    runs = [run(lambda _: ratio, 6000, seed, requests) for seed in SEEDS]
    assert np.mean([len(one.changes) for one in runs]) < 5
    assert np.mean([one.regret for one in runs]) < 0.02


@pytest.mark.parametrize("requests", [1, 16])
@pytest.mark.parametrize(("before", "after"), [(2.0, 0.7), (1.3, 0.8), (0.9, 1.2), (0.9, 1.5)])
def test_a_change_of_load_is_followed_within_some_hundred_rounds(
    before: float, after: float, requests: int
) -> None:
    changed = 3000

    def ratio(number: int) -> float:
        return before if number < changed else after

    runs = [run(ratio, 8000, seed, requests) for seed in SEEDS]
    assert [one.on for one in runs] == [after > 1.0] * len(runs)
    late = [next(n for n in one.changes if n >= changed) - changed for one in runs]
    assert np.median(late) < 1000
    assert np.mean([one.probes / one.best for one in runs]) < 0.01


def test_it_beats_both_fixed_settings_where_the_better_one_changes() -> None:
    def ratio(number: int) -> float:
        return 1.4 if number // 3000 % 2 else 0.7

    # Per second: a fixed setting gets the mean of its own speeds, the better way the best of each.
    runs = [run(ratio, 24_000, seed, 4) for seed in SEEDS]
    speed = np.mean([1.0 - one.regret for one in runs]) * 2 / (1 / 1.0 + 1 / 1.4)
    always_on = 2 / (1 / 0.7 + 1 / 1.4)
    assert speed > 1.05 * always_on
    assert speed > 1.05


def test_a_gain_that_is_plain_from_step_times_needs_no_trial() -> None:
    switch = Switch()
    run(lambda _: 2.0, 120, 0, 16, switch)
    assert switch.probes == 0
    assert switch.usually


def test_probes_are_rarer_the_worse_the_other_way_is() -> None:
    probes = []
    for ratio in (1.05, 1.3, 2.0):
        switch = Switch()
        run(lambda _, ratio=ratio: ratio, 6000, 0, 16, switch)  # type: ignore[misc]
        probes.append(switch.probes)
    assert probes[0] > probes[1] > probes[2] > 0


def test_a_new_level_expects_what_its_neighbour_has_found() -> None:
    switches = Switches()
    run(lambda _: 0.7, 1000, 0, 16, switches.of(16, False))
    assert not switches.of(16, False).usually
    assert not switches.of(32, False).usually
    # A smaller batch has more to gain.
    assert switches.of(8, False).usually
    # Greedy batches say nothing of sampled ones.
    assert switches.of(16, True).usually


def test_a_level_is_left_only_when_the_batch_is_well_beyond_it() -> None:
    switches = Switches()
    sixteen = switches.of(16, False)
    assert switches.of(17, False) is sixteen
    assert switches.of(20, False) is sixteen
    thirty_two = switches.of(21, False)
    assert thirty_two is not sixteen
    assert switches.of(16, False) is thirty_two
    assert switches.of(12, False) is sixteen


def test_a_probe_ends_when_its_level_is_left() -> None:
    switch = Switch()
    for _ in range(2000):
        switch.observe(2.0, PLAIN)
        if switch.on != switch.usually:
            break
    assert not switch.on
    switch.leave()
    assert switch.on


@pytest.mark.parametrize("requests", [1, 16])
def test_a_bad_moment_at_the_start_does_not_last(requests: int) -> None:
    """Something else slows speculation to a third while it is judged for the first time."""
    bad = 100
    runs = [run(lambda n: 0.35 if n < bad else 1.8, 5000, seed, requests) for seed in SEEDS]
    back = [next((n for n in one.changes if n >= bad and n > one.changes[0]), 0) for one in runs]
    assert all(one.on for one in runs)
    assert np.median(back) < 2000
