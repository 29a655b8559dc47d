"""How many branches the draft's speed affords."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.core.budget import StepTimeModel, worth_of_a_hit
from vllm_ssd.core.forks import choose_forks
from vllm_ssd.core.outcomes import OutcomeModel

DEPTH = 6
ACCEPTANCE = 0.7
CHANCES = OutcomeModel(4).chances(
    np.array([DEPTH]),
    np.array([DEPTH + 1]),
    np.full((1, DEPTH + 1, 4), [0.6, 0.2, 0.1, 0.1], np.float32),
)
ALL = 1 + 3 * (DEPTH + 1)


def clock(base: float, per_row: float) -> StepTimeModel:
    """The fitted model of a draft whose step takes ``base + per_row * rows`` seconds."""
    model = StepTimeModel()
    for step in range(200):
        rows = 1 + step % 24
        model.observe(rows, base + per_row * rows)
    return model


def affordable(
    model: StepTimeModel,
    seconds: float,
    requests: int = 1,
    prepared: bool = True,
    price: float = 0.0,
) -> int:
    """The best number of branches."""
    worth = worth_of_a_hit(ALL, model, seconds, requests, DEPTH, ACCEPTANCE, prepared, price=price)
    return 1 + len(choose_forks(CHANCES, np.array([ALL]), worth[None]).k)


def predicted(model: StepTimeModel, rows: float) -> float:
    return float(model.predict(np.array([rows]))[0])


@given(st.floats(1e-4, 1e-1), st.floats(0.0, 3.0))
def test_step_time_model_recovers_a_line(base: float, growth: float) -> None:
    per_row = growth * base
    model = clock(base, per_row)
    for rows in (1, 12, 24, 48):
        assert predicted(model, rows) == pytest.approx(base + per_row * rows, rel=0.05)


def test_step_time_model_predicts_zero_before_the_first_step() -> None:
    assert predicted(StepTimeModel(), 8) == 0.0


def test_step_time_model_answers_the_mean_while_it_has_seen_one_number_of_rows() -> None:
    model = StepTimeModel()
    for _ in range(10):
        model.observe(4, 0.002)
    assert predicted(model, 1) == predicted(model, 40) == pytest.approx(0.002)


def test_step_time_model_never_predicts_that_more_rows_are_cheaper() -> None:
    model = StepTimeModel()
    model.observe(1, 0.003)
    model.observe(20, 0.001)
    assert predicted(model, 20) >= predicted(model, 1) > 0.0


def test_step_time_model_follows_a_changed_load() -> None:
    model = clock(0.001, 0.0)
    for step in range(500):
        model.observe(1 + step % 24, 0.004)
    assert predicted(model, 8) == pytest.approx(0.004, rel=0.02)


def test_a_pause_hardly_changes_what_steps_are_expected_to_take() -> None:
    model = clock(0.001, 0.0001)
    before = [predicted(model, rows) for rows in (1, 24)]
    model.observe(24, 0.3)
    assert [predicted(model, rows) for rows in (1, 24)] == pytest.approx(before, rel=0.1)


def test_step_time_model_never_predicts_a_free_step() -> None:
    model = StepTimeModel()
    for rows in (20, 21, 22, 23):
        model.observe(rows, 0.001 * (rows - 19))
    assert predicted(model, 1) > 0.0


@given(st.integers(1, 20), st.floats(0.0, 1.0))
def test_a_branch_of_full_depth_is_worth_the_chance_of_each_of_its_tokens(
    depth: int, acceptance: float
) -> None:
    worth = worth_of_a_hit(3, clock(1e-6, 0.0), 1.0, 1, depth, acceptance, prepared=True)
    by_hand = sum(acceptance**i for i in range(1, depth + 1))
    assert worth.tolist() == pytest.approx([by_hand] * 3)


@given(st.floats(0.0, 1.0), st.floats(0.0, 2.0))
def test_a_token_is_worth_its_chance_less_what_verifying_it_costs(
    chance: float, price: float
) -> None:
    (worth,) = worth_of_a_hit(1, clock(1e-6, 0.0), 1.0, 1, 1, chance, prepared=True, price=price)
    assert max(0.0, chance - price) - 1e-9 <= worth <= chance + 1e-9
    if price >= 2.0 * chance:
        assert worth == 0.0  # none is verified


def test_branches_grow_in_number_not_in_depth_where_deep_tokens_do_not_pay() -> None:
    slow = clock(0.004, 0.001)
    counts = [affordable(slow, 0.05, price=price) for price in (0.0, 0.1, 0.3)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_a_branch_that_is_cut_off_is_worth_what_it_reached() -> None:
    worth = worth_of_a_hit(2, clock(0.0, 0.01), 0.05, 1, DEPTH, 0.5, prepared=True)
    # One row: five steps fit, four are completed. Two rows: one and a half of two and a half.
    assert worth.tolist() == pytest.approx([0.5 + 0.25 + 0.125 + 0.0625, 0.5 + 0.125], rel=0.05)


def test_an_outcome_also_waits_for_a_step_launched_ahead() -> None:
    model = clock(0.01, 0.0)
    behind = worth_of_a_hit(1, model, 0.05, 1, DEPTH, 0.5, prepared=True, lookahead=True)
    # Five steps fit. One ends too late and one was launched behind it: three are completed.
    assert behind.tolist() == pytest.approx([0.5 + 0.25 + 0.125], rel=1e-3)


def test_a_fast_draft_gets_every_branch() -> None:
    assert affordable(clock(1e-5, 1e-6), seconds=0.1) == ALL


def test_a_draft_whose_step_costs_the_same_at_any_width_gets_every_branch() -> None:
    assert affordable(clock(0.01, 0.0), seconds=0.1) == ALL


def test_a_slow_draft_gets_few_branches_rather_than_shallow_ones() -> None:
    slow = clock(0.001, 0.01)
    count = affordable(slow, seconds=0.1)
    assert 1 <= count < ALL / 2
    # With all of them not one whole step would fit.
    assert 0.1 / predicted(slow, ALL) < 1 < 0.1 / predicted(slow, count) - 1


def test_without_candidates_there_is_time_for_fewer_branches() -> None:
    model = clock(0.002, 0.001)
    assert affordable(model, 0.04, prepared=False) < affordable(model, 0.04)


def test_a_draft_too_slow_for_one_token_still_gets_a_branch() -> None:
    assert 1 <= affordable(clock(1.0, 10.0), seconds=0.01) <= 2


def test_more_requests_leave_fewer_branches_to_each() -> None:
    model = clock(0.001, 0.0005)
    counts = [affordable(model, 0.03, requests) for requests in (1, 4, 16, 64)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_everything_is_drafted_while_nothing_was_measured() -> None:
    assert affordable(StepTimeModel(), seconds=0.1) == ALL
    assert affordable(clock(0.1, 0.1), seconds=0.0) == ALL
