"""Which outcomes are guessed, and in which order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.core.fanout import geometric_fan_out, likeliest_guesses, uniform_fan_out

depths = st.integers(1, 10)
fan_outs = st.integers(1, 8)
acceptances = st.floats(0.05, 0.95)
miss_exponents = st.floats(0.1, 4.0)


def test_uniform_fan_out_guesses_as_much_after_every_k() -> None:
    assert uniform_fan_out(3, 2) == (2, 2, 2, 2)


@given(depths, fan_outs, acceptances, miss_exponents)
def test_geometric_fan_out_keeps_the_sum_of_the_uniform_one(
    depth: int, fan_out: int, acceptance: float, miss_exponent: float
) -> None:
    per_k = geometric_fan_out(depth, fan_out, acceptance, miss_exponent)
    assert len(per_k) == depth + 1
    assert sum(per_k) == sum(uniform_fan_out(depth, fan_out))
    assert min(per_k) >= 0


@pytest.mark.parametrize(("acceptance", "miss_exponent"), [(0.5, 1.0), (0.8, 0.5), (0.9, 2.0)])
def test_geometric_fan_out_has_the_ratios_of_theorem_12(
    acceptance: float, miss_exponent: float
) -> None:
    depth = 4
    # So many guesses that rounding to whole ones does not show.
    per_k = geometric_fan_out(depth, 100_000, acceptance, miss_exponent)
    exponent = 1.0 / (1.0 + miss_exponent)
    for k in range(depth - 1):
        assert per_k[k + 1] / per_k[k] == pytest.approx(acceptance**exponent, rel=1e-3)
    last = acceptance**exponent * (1.0 - acceptance) ** -exponent
    assert per_k[depth] / per_k[depth - 1] == pytest.approx(last, rel=1e-3)


@given(depths, fan_outs, acceptances, miss_exponents)
def test_guesses_come_likeliest_first(
    depth: int, fan_out: int, acceptance: float, miss_exponent: float
) -> None:
    guesses = likeliest_guesses(depth, (fan_out,) * (depth + 1), acceptance, miss_exponent)
    chances = [guess.probability for guess in guesses]
    assert chances == sorted(chances, reverse=True)
    # Of one k the draft's better candidates come first, without a gap.
    for k in range(depth + 1):
        assert [g.rank for g in guesses if g.accepted == k] == list(range(fan_out))


def test_probability_of_a_guess_is_that_of_its_k_times_that_of_its_rank() -> None:
    guesses = likeliest_guesses(2, (2, 2, 2), 0.6, 1.0)
    chance = {(guess.accepted, guess.rank): guess.probability for guess in guesses}
    assert chance[0, 0] == pytest.approx(0.4 * 1 / 2)
    assert chance[1, 0] == pytest.approx(0.6 * 0.4 * 1 / 2)
    assert chance[1, 1] == pytest.approx(0.6 * 0.4 * (1 / 2 - 1 / 3))
    # After all tokens were accepted nothing is left to be rejected.
    assert chance[2, 0] == pytest.approx(0.36 * 1 / 2)


@given(depths, fan_outs, acceptances, miss_exponents)
def test_endless_guessing_would_be_certain_to_hit(
    depth: int, fan_out: int, acceptance: float, miss_exponent: float
) -> None:
    guesses = likeliest_guesses(depth, (fan_out,) * (depth + 1), acceptance, miss_exponent)
    # Per k the ranks' chances telescope to 1 - (F + 1)^-r, and the k's own add up to 1.
    expected = 1.0 - (fan_out + 1.0) ** -miss_exponent
    assert sum(guess.probability for guess in guesses) == pytest.approx(expected)


@given(st.data(), fan_outs, acceptances)
def test_with_fewer_verified_tokens_the_whole_budget_goes_to_what_can_happen(
    data: st.DataObject, fan_out: int, acceptance: float
) -> None:
    depth = data.draw(depths)
    verified = data.draw(st.integers(0, depth))
    fan_out_per_k = uniform_fan_out(depth, fan_out)
    guesses = likeliest_guesses(verified, fan_out_per_k, acceptance, 1.0)
    assert len(guesses) == sum(fan_out_per_k)
    assert {guess.accepted for guess in guesses} == set(range(verified + 1))


def test_after_a_prompt_every_guess_is_for_k_0() -> None:
    guesses = likeliest_guesses(0, (1, 2, 3), 0.7, 1.0)
    assert [(guess.accepted, guess.rank) for guess in guesses] == [(0, rank) for rank in range(6)]


def test_a_list_of_fan_outs_bounds_each_k() -> None:
    guesses = likeliest_guesses(2, (3, 0, 1), 0.7, 1.0)
    assert sorted(guess.accepted for guess in guesses) == [0, 0, 0, 2]


def test_possible_outcomes_are_guessed_even_if_the_list_gives_them_nothing() -> None:
    guesses = likeliest_guesses(1, (0, 0, 4), 0.7, 1.0)
    assert {guess.accepted for guess in guesses} == {0, 1}
