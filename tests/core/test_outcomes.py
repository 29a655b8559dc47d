"""Which outcomes are guessed, in which order, and how that follows what is observed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.core.arrays import Float32Array
from vllm_ssd.core.forks import uniform_fan_out
from vllm_ssd.core.outcomes import Forecast, OutcomeModel

depths = st.integers(1, 10)
fan_outs = st.integers(1, 8)
acceptances = st.floats(0.05, 0.95)
miss_exponents = st.floats(0.1, 4.0)
confidences = st.floats(0.0, 1.0, width=32)


def sure(*values: float) -> Float32Array:
    return np.array(values, np.float32)


def forecast(
    verified: int, fan_out: tuple[int, ...], acceptance: float = 0.7, miss_exponent: float = 1.0
) -> Forecast:
    """Before anything was observed."""
    model = OutcomeModel(acceptance, miss_exponent, sum(fan_out), fan_out)
    return model.forecast(verified, sure(*[0.5] * verified))


def chances(of: Forecast) -> list[float]:
    """Of each fork."""
    return np.diff(of.hit).tolist()


@given(depths, fan_outs, acceptances, miss_exponents)
def test_forks_come_likeliest_first(
    depth: int, fan_out: int, acceptance: float, miss_exponent: float
) -> None:
    guessed = forecast(depth, (fan_out,) * (depth + 1), acceptance, miss_exponent)
    assert chances(guessed) == pytest.approx(sorted(chances(guessed), reverse=True), abs=1e-12)
    # The trunk is the first guess after all tokens.
    wanted = dict.fromkeys(range(depth), fan_out) | {depth: fan_out - 1}
    assert Counter(guessed.accepted.tolist()) == {k: n for k, n in wanted.items() if n}


def test_chance_of_an_outcome_is_that_of_its_k_times_that_of_its_rank() -> None:
    guessed = forecast(2, (2, 2, 2), acceptance=0.6)
    by_hand = {
        (0, 0.4 * 1 / 2),
        (0, 0.4 * (1 / 2 - 1 / 3)),
        (1, 0.6 * 0.4 * 1 / 2),
        (1, 0.6 * 0.4 * (1 / 2 - 1 / 3)),
        (2, 0.36 * 0.4 * 1 / 2),
    }
    found = zip(guessed.accepted.tolist(), chances(guessed), strict=True)
    assert sorted(found) == [pytest.approx(pair) for pair in sorted(by_hand)]
    assert guessed.hit[0] == pytest.approx(0.6**3)


@given(depths, fan_outs, acceptances, miss_exponents)
def test_endless_guessing_would_be_certain_to_hit(
    depth: int, fan_out: int, acceptance: float, miss_exponent: float
) -> None:
    guessed = forecast(depth, (*[fan_out] * depth, fan_out + 1), acceptance, miss_exponent)
    # Wherever the first choice is wrong, F others are all wrong with chance (F + 1)^-r.
    wrong = 1.0 - acceptance ** (depth + 1)
    assert guessed.hit[-1] == pytest.approx(1.0 - wrong * (fan_out + 1.0) ** -miss_exponent)


@given(st.data(), fan_outs, acceptances)
def test_with_fewer_verified_tokens_the_whole_budget_goes_to_what_can_happen(
    data: st.DataObject, fan_out: int, acceptance: float
) -> None:
    depth = data.draw(depths)
    verified = data.draw(st.integers(0, depth))
    budget = uniform_fan_out(depth, fan_out)
    guessed = forecast(verified, budget, acceptance)
    assert len(guessed.hit) == sum(budget)
    assert set(guessed.accepted.tolist()) <= set(range(verified + 1))


def test_after_a_prompt_every_guess_is_for_k_0() -> None:
    assert forecast(0, (1, 2, 3)).accepted.tolist() == [0] * 5


def test_a_list_of_fan_outs_bounds_each_k() -> None:
    assert sorted(forecast(2, (3, 0, 2)).accepted.tolist()) == [0, 0, 0, 2]


def test_possible_outcomes_are_guessed_even_if_the_list_gives_them_nothing() -> None:
    assert set(forecast(1, (0, 0, 4)).accepted.tolist()) == {0, 1}


# ---- what is learned


def test_acceptance_follows_what_came_true() -> None:
    model = OutcomeModel(0.9, 1.0, 4, (1, 1))
    for _ in range(2000):
        model.observe(sure(0.5, 0.5, 0.5, 0.5), right=3, rank=0)
    assert model.acceptance == pytest.approx(0.75, abs=0.02)
    for _ in range(20000):
        model.observe(sure(0.5), right=0)
    assert model.acceptance < 0.01


def test_where_the_draft_is_sure_it_is_right_as_often_as_it_was_at_that_confidence() -> None:
    model = OutcomeModel(0.5, 1.0, 3, (2, 2, 2))
    for _ in range(3000):
        model.observe(sure(0.95, 0.2), right=1, rank=0)
    # The doubtful token is the one whose rejection is worth guessing.
    first, *_ = model.forecast(2, sure(0.95, 0.2)).accepted.tolist()
    assert first == 1
    first, *_ = model.forecast(2, sure(0.2, 0.95)).accepted.tolist()
    assert first == 0
    # A draft that is wrong where it is sure is believed no longer.
    for _ in range(3000):
        model.observe(sure(0.95), right=0, rank=0)
        model.observe(sure(0.2), right=1)
    first, *_ = model.forecast(2, sure(0.2, 0.95)).accepted.tolist()
    assert first == 1


def test_a_confidence_that_is_not_known_yet_stands_for_any() -> None:
    model = OutcomeModel(0.5, 1.0, 3, (2, 2))
    for _ in range(3000):
        model.observe(sure(0.9), right=1)
        model.observe(sure(0.1), right=0, rank=0)
    unknown, certain = model.forecast(1, sure(0.9)), model.forecast(1, sure(0.9, 0.9))
    assert unknown.hit[0] == pytest.approx(model.acceptance, abs=0.02)
    assert certain.hit[0] == pytest.approx(1.0, abs=0.02)


def test_levels_that_do_not_occur_any_more_keep_what_they_learned() -> None:
    model = OutcomeModel(0.5, 1.0, 3, (2, 2))
    for _ in range(3000):
        model.observe(sure(0.9), right=1)
    for _ in range(3000):
        model.observe(sure(0.1), right=0)
    for _ in range(10):
        model.observe(sure(0.9), right=0)
    # Ten surprises among a thousand, not among the few of these that are remembered.
    assert model.forecast(0, sure(0.9)).hit[0] > 0.95


def test_ranks_are_learned() -> None:
    model = OutcomeModel(0.5, 1.0, 3, (3, 1))
    for _ in range(3000):
        model.observe(sure(0.5), right=0, rank=1)
        model.observe(sure(0.5), right=0, rank=0)
        model.observe(sure(0.5), right=1)
    wrong = 1.0 - model.acceptance
    found = chances(model.forecast(0, sure(0.5)))
    assert found == pytest.approx([wrong / 2, wrong / 2, 0.0], rel=0.03, abs=0.003)


def test_better_choices_are_never_believed_less_than_worse_ones() -> None:
    model = OutcomeModel(0.5, 1.0, 3, (1, 3))
    for _ in range(3000):
        model.observe(sure(0.5), right=0, rank=1)
        model.observe(sure(0.5), right=1)
    guessed = model.forecast(1, sure(0.5, 0.5))
    # Only one is guessed after k = 0, and it is the first.
    by_k = dict(zip(guessed.accepted.tolist(), chances(guessed), strict=False))
    assert by_k[0] == pytest.approx(0.5, abs=0.03)


def test_a_token_that_was_no_candidate_makes_every_guess_less_likely() -> None:
    model = OutcomeModel(0.5, 1.0, 3, (3,))
    before = sum(chances(model.forecast(0, sure(0.5))))
    for _ in range(200):
        model.observe(sure(0.5), right=0, rank=7)
        model.observe(sure(0.5), right=1)
    assert sum(chances(model.forecast(0, sure(0.5)))) < before / 3


@given(
    st.lists(st.tuples(st.lists(confidences, max_size=7), st.integers(0, 9), st.booleans())),
    st.integers(0, 6),
    st.lists(confidences, max_size=7),
    fan_outs,
)
def test_whatever_was_observed_the_guesses_are_in_order_and_no_more_than_certain(
    observed: list[tuple[list[float], int, bool]],
    verified: int,
    confidence: list[float],
    fan_out: int,
) -> None:
    model = OutcomeModel(0.7, 1.0, 8, uniform_fan_out(6, fan_out))
    for seen, rank, wrong in observed:
        model.observe(sure(*seen), len(seen) - wrong if seen else 0, rank if wrong else None)
    guessed = model.forecast(verified, sure(*confidence[: verified + 1]))
    found = chances(guessed)
    assert found == pytest.approx(sorted(found, reverse=True), abs=1e-12)
    assert 0.0 <= guessed.hit[-1] <= 1.0 + 1e-9
    assert 0.0 < model.acceptance < 1.0
