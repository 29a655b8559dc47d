"""Which outcomes are guessed, in which order, and how that follows what is observed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.core.fanout import uniform_fan_out
from vllm_ssd.core.outcomes import Guess, OutcomeModel

depths = st.integers(1, 10)
fan_outs = st.integers(1, 8)
acceptances = st.floats(0.05, 0.95)
miss_exponents = st.floats(0.1, 4.0)


def likeliest_guesses(
    verified: int, fan_out: Sequence[int], acceptance: float, miss_exponent: float
) -> list[Guess]:
    """Before anything was observed."""
    return OutcomeModel(acceptance, miss_exponent, sum(fan_out)).likeliest(verified, fan_out)


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


def test_acceptance_follows_what_is_accepted() -> None:
    model = OutcomeModel(0.9, 1.0, 4)
    for _ in range(300):
        # Three of four: the token after a rejected one was never tried.
        model.observe(verified=6, accepted=3, rank=0)
    assert model.acceptance == pytest.approx(0.75, abs=0.01)
    for _ in range(5000):
        model.observe(verified=6, accepted=0, rank=None)
    assert model.acceptance < 0.02


def test_tokens_that_were_not_verified_say_nothing_of_acceptance() -> None:
    model = OutcomeModel(0.6, 1.0, 4)
    for _ in range(50):
        model.observe(verified=0, accepted=0, rank=2)
    assert model.acceptance == pytest.approx(0.6)


def test_ranks_after_a_rejection_and_after_all_tokens_are_learned_apart() -> None:
    model = OutcomeModel(0.5, 1.0, 3)
    for _ in range(2000):
        model.observe(verified=1, accepted=0, rank=1)
        model.observe(verified=1, accepted=0, rank=0)
        model.observe(verified=1, accepted=1, rank=0)
    chance = {(g.accepted, g.rank): g.probability for g in model.likeliest(1, (3, 3))}
    a = model.acceptance
    assert chance[0, 0] == pytest.approx((1 - a) / 2, rel=0.02)
    assert chance[0, 1] == pytest.approx((1 - a) / 2, rel=0.02)
    assert chance[1, 0] == pytest.approx(a, rel=0.02)
    assert chance[0, 2] < 0.01 > chance[1, 1]


def test_a_token_that_was_no_candidate_makes_every_guess_less_likely() -> None:
    model = OutcomeModel(0.5, 1.0, 3)
    before = sum(guess.probability for guess in model.likeliest(0, (3,)))
    for _ in range(200):
        model.observe(verified=0, accepted=0, rank=7)
    assert sum(guess.probability for guess in model.likeliest(0, (3,))) < before / 3


outcomes = st.tuples(st.integers(0, 6), st.integers(0, 6), st.none() | st.integers(0, 9))


@given(st.lists(outcomes, max_size=60), st.integers(0, 6), fan_outs)
def test_whatever_was_observed_the_guesses_are_in_order_and_no_more_than_certain(
    observed: list[tuple[int, int, int | None]], verified: int, fan_out: int
) -> None:
    model = OutcomeModel(0.7, 1.0, 8)
    for tried, accepted, rank in observed:
        model.observe(tried, min(tried, accepted), rank)
    guesses = model.likeliest(verified, uniform_fan_out(6, fan_out))
    chances = [guess.probability for guess in guesses]
    assert chances == sorted(chances, reverse=True)
    assert sum(chances) <= 1.0 + 1e-9
    assert 0.0 < model.acceptance < 1.0
    for k in range(verified + 1):
        ranks = [guess.rank for guess in guesses if guess.accepted == k]
        assert ranks == list(range(len(ranks)))
