"""The estimated chance of each outcome, and how it follows the observations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.core.arrays import Float32Array, Float64Array
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
def test_the_stated_probability_is_used_until_something_was_observed(p: float) -> None:
    # To the level it falls into: one unit of log-odds.
    chance = float(Calibration().of(stated([p]))[0, 0])
    assert abs(np.log(chance / (1 - chance)) - np.log(p / (1 - p))) <= 0.5


def test_observations_outweigh_stated_probabilities() -> None:
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
    # Ten surprises among a thousand, not among the few that still have weight.
    assert float(calibration.of(np.array([0.9], np.float32))[0]) > 0.95


# ---- outcomes


def chances(model: OutcomeModel, *rows: list[float], verified: int | None = None) -> Float64Array:
    """The chances of one verification's outcomes, ``[n + 1, C]``; all choices given are known."""
    n = len(rows) - 1 if verified is None else verified
    padded = np.zeros((1, n + 1, len(rows[0])), np.float32)
    padded[0, : len(rows)] = stated(*rows)
    return model.chances(np.array([n]), np.array([len(rows)]), padded)[0]


def observe(model: OutcomeModel, *pairs: tuple[list[float], int]) -> None:
    """Take in the probabilities stated at each position, and which choice came."""
    model.observe(stated(*[row for row, _ in pairs]), np.array([came for _, came in pairs]))


def test_the_chance_of_an_outcome_is_that_of_its_k_times_that_of_its_token() -> None:
    # Probabilities in the middle of their levels, all of them.
    half, low = 0.5, 1.0 / (1.0 + np.e)
    found = chances(OutcomeModel(3), [half, half * low, half * half], [low, 0.2, 0.2])
    assert found[0].tolist() == pytest.approx([0.0, half * low, half * half])
    shares = Calibration().of(stated([0.2 / (1 - low)]))[0, 0]
    miss = half * (1 - low) * shares
    assert found[1].tolist() == pytest.approx([half * low, miss, miss])


def test_verifications_of_different_lengths_are_told_apart() -> None:
    model = OutcomeModel(3)
    rows = stated(position(0.9), position(0.6), position(0.3))
    both = np.stack([rows, rows])
    found = model.chances(np.array([2, 0]), np.array([3, 1]), both)
    assert found[0] == pytest.approx(chances(model, *[position(p) for p in (0.9, 0.6, 0.3)]))
    assert found[1, :1] == pytest.approx(chances(model, position(0.9)))
    assert (found[1, 1:] == 0.0).all()


def test_forks_go_where_the_draft_is_wrong_not_where_it_is_unsure() -> None:
    model = OutcomeModel(3)
    doubtful = (position(0.95), position(0.2))
    before = chances(model, *doubtful)
    assert before[1, 1] > before[0, 1]
    # It is wrong where it is sure, and right where it is not.
    for _ in range(3000):
        observe(model, (position(0.95), 1), (position(0.2), 0))
    after = chances(model, *doubtful)
    assert after[0, 1] > after[1, 1]


def test_the_drafts_own_probabilities_rank_the_other_choices_of_all_positions() -> None:
    # The same doubt at both positions; one has a runner-up, the other has none.
    found = chances(OutcomeModel(3), [0.5, 0.45, 0.05], [0.5, 0.25, 0.25])
    assert found[0, 1] * 0.5 > found[1, 1] > found[0, 2] * 0.5


def test_a_choice_that_keeps_coming_becomes_more_likely() -> None:
    model = OutcomeModel(4)
    for _ in range(3000):
        observe(model, (position(0.5, 4), 3))
    found = chances(model, position(0.5, 4))[0]
    assert found[3] > 5 * found[1]
    assert found[3] == pytest.approx(1.0, abs=0.02)


def test_a_token_that_was_no_choice_makes_every_guess_less_likely() -> None:
    model = OutcomeModel(3)
    before = chances(model, position(0.5))[0, 1:].sum()
    for _ in range(500):
        observe(model, (position(0.5), -1), (position(0.5), 0))
    assert chances(model, position(0.5))[0, 1:].sum() < before / 3


def test_positions_not_known_yet_get_the_drafts_average_probabilities() -> None:
    model = OutcomeModel(3)
    for _ in range(3000):
        observe(model, (position(0.9), 0))
    unknown = chances(model, position(0.9), verified=1)
    assert unknown == pytest.approx(chances(model, position(0.9), position(0.9)), abs=0.02)


@given(
    st.lists(
        st.tuples(st.lists(probabilities, min_size=1, max_size=7), st.integers(-1, 3)), max_size=20
    ),
    st.integers(0, 6),
    st.lists(probabilities, min_size=1, max_size=7),
)
def test_whatever_was_observed_no_outcome_is_more_than_certain(
    observed: list[tuple[list[float], int]], verified: int, firsts: list[float]
) -> None:
    model = OutcomeModel(4)
    for seen, last in observed:
        observe(model, *[(position(p, 4), 0) for p in seen[:-1]], (position(seen[-1], 4), last))
    known = [position(p, 4) for p in firsts[: verified + 1]]
    found = chances(model, *known, verified=verified)
    assert found.shape == (verified + 1, 4)
    assert (found >= 0.0).all()
    assert (found[:-1, 0] == 0.0).all()
    # Each k ends in one way at most, so far as the draft's choices go.
    assert found[:, 1:].max(axis=1).sum() + found[-1, 0] <= 1.0 + 1e-9
