"""The fitted times of the target's steps."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ssd.core.step_times import Line, StepTimes, level_of


def test_levels_are_powers_of_two() -> None:
    assert [level_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 32, 33)] == [0, 1, 2, 2, 3, 3, 4, 5, 6]


def observe(times: StepTimes, requests: int, rounds: int = 200, slope: float = 1e-3) -> None:
    """Noisy steps of 30 ms and ``slope`` a token; plain ones take 25 ms and the same."""
    chance = np.random.default_rng(requests)
    for _ in range(rounds):
        drafted = int(chance.integers(0, 6 * requests + 1))
        seconds = (0.030 if drafted else 0.025) + slope * (requests + drafted)
        times.observe(requests, drafted, seconds * chance.normal(1.0, 0.03))


@pytest.mark.parametrize("requests", [1, 3, 16])
def test_the_line_is_found_and_plain_steps_are_apart(requests: int) -> None:
    times = StepTimes()
    observe(times, requests)
    for _ in range(20):
        times.observe(requests, 0, 0.025 + 1e-3 * requests)
    forecast = times.forecast(requests)
    assert forecast.plain == pytest.approx(0.025 + 1e-3 * requests, rel=0.05)
    assert forecast.each == pytest.approx(1e-3, rel=0.35)
    most = 6 * requests
    assert forecast.of(most) == pytest.approx(0.030 + 7e-3 * requests, rel=0.05)
    assert forecast.of(0) == forecast.plain


def test_nothing_is_known_at_first() -> None:
    times = StepTimes()
    assert times.forecast(4) == (0.0, 0.0, 0.0)
    assert times.plain(4) == times.usual(4) == 0.0


def test_a_level_not_seen_takes_what_a_token_costs_from_the_others() -> None:
    times = StepTimes()
    observe(times, 4)
    forecast = times.forecast(16)
    assert forecast.each == pytest.approx(1e-3, rel=0.35)
    assert forecast.base == pytest.approx(0.046, rel=0.15)


def test_where_always_as_much_is_verified_plain_steps_say_what_a_token_costs() -> None:
    times = StepTimes()
    for _ in range(30):
        for drafted in (0, 0, 6, 6):
            times.observe(1, drafted, 0.030 + 1e-3 * drafted)
    assert times.forecast(1).each == pytest.approx(1e-3, rel=0.2)


@pytest.mark.parametrize("warm_up", [0, 3])
def test_pauses_do_not_move_the_line_much(warm_up: int) -> None:
    line = Line()
    chance = np.random.default_rng(0)
    for step in range(200):
        # The first steps compile or fill caches; later, now and then, there is a pause.
        pause = 1.0 if step < warm_up or (step > 20 and step % 20 == 0) else 0.0
        line.observe(1, 0.030 * chance.normal(1.0, 0.05) + pause)
    assert line.mean == pytest.approx(0.030, rel=0.1)


def test_a_lasting_change_is_followed_within_some_hundred_steps() -> None:
    line = Line()
    chance = np.random.default_rng(0)
    for seconds in (0.030, 0.090, 0.020):
        for _ in range(300):
            line.observe(1, seconds * chance.normal(1.0, 0.05))
        assert line.mean == pytest.approx(seconds, rel=0.2)


def test_more_tokens_never_make_a_step_cheaper() -> None:
    line = Line()
    for tokens in range(1, 20):
        line.observe(tokens, 1.0 / tokens)
    assert line.slope() == 0.0


@pytest.mark.parametrize("depth", [4, 6])
def test_drafts_that_are_deeper_after_a_slow_step_do_not_make_tokens_look_cheap(depth: int) -> None:
    line, chance = Line(memory=1000), np.random.default_rng(0)
    late = 0.0
    for _ in range(3000):
        # The draft decodes a token in 5 ms.
        tokens = int(np.clip(round(late / 0.005 + chance.normal(3.0, 1.5)), 0, depth))
        late = chance.normal(0.0, 0.0025)
        line.observe(tokens, 0.028 + 1.2e-3 * tokens + late)
    assert line.slope() == pytest.approx(1.2e-3, rel=0.1)


def test_slow_whiles_with_deeper_drafts_do_not_make_tokens_look_slow() -> None:
    line, chance = Line(), np.random.default_rng(0)
    for step in range(600):
        slow = step // 60 % 2
        tokens = 1 + int(chance.integers(0, 3)) + 3 * slow
        line.observe(tokens, (0.030 + 1e-3 * tokens) * (1 + 2 * slow) * chance.normal(1.0, 0.03))
    assert line.slope() < 4e-3
