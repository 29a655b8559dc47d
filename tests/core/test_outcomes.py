"""How likely each outcome is held to be, and how that follows what is observed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.core.arrays import Float32Array
from vllm_ssd.core.outcomes import Calibration, OutcomeModel

probabilities = st.floats(0.0, 1.0, width=32)


def stated(*rows: list[float]) -> Float32Array:
    """The draft's probabilities of its choices, a row for each position."""
    return np.array(rows, np.float32)


def position(first: float, choices: int = 3) -> list[float]:
    """The first choice's probability; the others share what is left, half of it for each next."""
    shares = 0.5 ** np.arange(1.0, choices)
    return [first, *((1.0 - first) * shares / shares.sum()).tolist()]


# ---- calibration


@pytest.mark.parametrize("p", [0.03, 0.5, 0.88, 0.99])
def test_a_draft_is_taken_at_its_word_until_something_was_seen(p: float) -> None:
    # To the level it falls into: one unit of log-odds.
    chance = float(Calibration().of(stated([p]))[0, 0])
    assert abs(np.log(chance / (1 - chance)) - np.log(p / (1 - p))) <= 0.5


def test_what_came_true_counts_more_than_what_was_stated() -> None:
    calibration = Calibration()
    rng = np.random.default_rng(0)
    for _ in range(1000):
        calibration.observe(np.array([0.9] * 3, np.float32), rng.random(3) < 0.3)
    assert float(calibration.of(np.array([0.9], np.float32))[0]) == pytest.approx(0.3, abs=0.05)


def test_near_certainty_and_certainty_are_told_apart() -> None:
    calibration = Calibration()
    for _ in range(500):
        calibration.observe(np.array([0.88, 0.9999], np.float32), np.array([False, True]))
    low, high = calibration.of(np.array([0.88, 0.9999], np.float32)).tolist()
    assert low < 0.1 < 0.99 < high


def test_levels_that_do_not_occur_any_more_keep_what_they_learned() -> None:
    calibration = Calibration()
    for _ in range(3000):
        calibration.observe(np.array([0.9], np.float32), np.array([True]))
    for _ in range(3000):
        calibration.observe(np.array([0.1], np.float32), np.array([False]))
    for _ in range(10):
        calibration.observe(np.array([0.9], np.float32), np.array([False]))
    # Ten surprises among a thousand, not among the few that are remembered.
    assert float(calibration.of(np.array([0.9], np.float32))[0]) > 0.95


# ---- outcomes


def test_the_chance_of_an_outcome_is_that_of_its_k_times_that_of_its_token() -> None:
    # Probabilities in the middle of their levels.
    half, other = 0.5, 1.0 / (1.0 + np.e)
    model = OutcomeModel(3)
    found = model.chances(1, stated([half, other / 2, 0.2], [other, 0.4, 0.1]))
    level = model._others.of
    shares = level(np.array([[other, 0.4]], np.float32))[0]
    assert found[0].tolist() == pytest.approx([0.0, *(half * shares)])
    shares = level(np.float32([[0.4 / (1 - other), 0.1 / (1 - other)]]))[0]
    assert found[1].tolist() == pytest.approx([half * other, *(half * (1 - other) * shares)])


def test_acceptance_follows_what_came_true() -> None:
    model = OutcomeModel(3)
    for _ in range(2000):
        model.observe(stated(*[position(0.5)] * 4), right=3, other=1)
    assert model.acceptance == pytest.approx(0.75, abs=0.02)
    for _ in range(20000):
        model.observe(stated(position(0.5)), right=0)
    assert model.acceptance < 0.01


def test_forks_belong_where_the_draft_is_wrong_not_where_it_says_so() -> None:
    model = OutcomeModel(3)
    doubtful = stated(position(0.95), position(0.2))
    before = model.chances(1, doubtful)
    assert before[1, 1] > before[0, 1]
    # It is wrong where it is sure, and right where it is not.
    for _ in range(3000):
        model.observe(stated(position(0.95)), right=0, other=1)
        model.observe(stated(position(0.2)), right=1)
    after = model.chances(1, doubtful)
    assert after[0, 1] > after[1, 1]


def test_the_drafts_own_probabilities_rank_the_other_choices_of_all_positions() -> None:
    # The same doubt at both positions; one has a runner-up, the other has none.
    found = OutcomeModel(3).chances(1, stated([0.5, 0.45, 0.05], [0.5, 0.25, 0.25]))
    reached = 0.5
    assert found[0, 1] * reached > found[1, 1] > found[0, 2] * reached


def test_a_choice_that_keeps_coming_is_believed_more() -> None:
    model = OutcomeModel(4)
    for _ in range(3000):
        model.observe(stated(position(0.5, 4)), right=0, other=3)
    found = model.chances(0, stated(position(0.5, 4)))[0]
    assert found[3] > 5 * found[1]
    assert found[3] == pytest.approx(1.0, abs=0.02)


def test_a_token_that_was_no_choice_makes_every_guess_less_likely() -> None:
    model = OutcomeModel(3)
    before = model.chances(0, stated(position(0.5)))[0, 1:].sum()
    for _ in range(500):
        model.observe(stated(position(0.5)), right=0, other=0)
        model.observe(stated(position(0.5)), right=1)
    assert model.chances(0, stated(position(0.5)))[0, 1:].sum() < before / 3


def test_what_is_not_known_yet_is_what_the_draft_usually_states() -> None:
    model = OutcomeModel(3)
    for _ in range(3000):
        model.observe(stated(position(0.9)), right=1)
    unknown, known = (
        model.chances(1, stated(position(0.9))),
        model.chances(1, stated(position(0.9), position(0.9))),
    )
    assert unknown == pytest.approx(known, abs=0.02)


@given(
    st.lists(
        st.tuples(st.lists(probabilities, max_size=7), st.integers(0, 3), st.booleans()),
        max_size=20,
    ),
    st.integers(0, 6),
    st.lists(probabilities, max_size=7),
)
def test_whatever_was_observed_no_outcome_is_more_than_certain(
    observed: list[tuple[list[float], int, bool]], verified: int, firsts: list[float]
) -> None:
    model = OutcomeModel(4)
    for seen, other, wrong in observed:
        rows = np.array([position(p, 4) for p in seen], np.float32).reshape(-1, 4)
        model.observe(rows, len(seen) - wrong if seen else 0, other if wrong else None)
    known = np.array([position(p, 4) for p in firsts[: verified + 1]], np.float32).reshape(-1, 4)
    found = model.chances(verified, known)
    assert found.shape == (verified + 1, 4)
    assert (found >= 0.0).all()
    assert (found[:-1, 0] == 0.0).all()
    assert found.max() <= 1.0 + 1e-9
    # Each k ends in one way at most, so far as the draft's choices go.
    assert found[:, 1:].max(axis=1).sum() + found[-1, 0] <= 1.0 + 1e-9
    assert 0.0 < model.acceptance < 1.0
