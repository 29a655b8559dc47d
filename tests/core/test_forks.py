"""Which outcomes get a fork, and how many do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.core.arrays import Float64Array
from vllm_ssd.core.forks import caps_for, choose_forks, geometric_fan_out

depths = st.integers(1, 10)
fan_outs = st.integers(1, 8)
acceptances = st.floats(0.05, 0.95)
miss_exponents = st.floats(0.1, 4.0)
some_chance = st.sampled_from([0.0, 0.01, 0.02, 0.05, 0.1])
chance_tables = st.integers(1, 7).flatmap(
    lambda rows: st.integers(2, 6).flatmap(
        lambda columns: st.lists(
            st.lists(some_chance, min_size=columns, max_size=columns),
            min_size=rows,
            max_size=rows,
        ).map(np.array)
    )
)


def forks_of(
    chances: Float64Array, most: int = 100, caps: list[int] | None = None
) -> list[tuple[int, int]]:
    """The outcomes of one request that get a fork, likeliest first."""
    each = None if caps is None else np.array([caps])
    forks = choose_forks(chances[None], np.array([most]), caps=each)
    return list(zip(forks.k.tolist(), forks.choice.tolist(), strict=True))


# ---- the likeliest outcomes


@given(chance_tables, st.integers(0, 50))
def test_forks_are_the_likeliest_outcomes_whatever_their_k(
    chances: Float64Array, most: int
) -> None:
    found = forks_of(chances, most)
    by_hand = sorted(
        (float(chance) for row in chances for chance in row[1:] if chance), reverse=True
    )
    assert [chances[outcome] for outcome in found] == by_hand[:most]
    assert len(set(found)) == len(found)


@given(chance_tables, st.data())
def test_caps_bound_the_forks_for_each_k(chances: Float64Array, data: st.DataObject) -> None:
    size = len(chances)
    caps = data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    found = forks_of(chances, caps=caps)
    for k, cap in enumerate(caps):
        possible = [choice for choice in range(1, chances.shape[1]) if chances[k, choice]]
        assert sorted(choice for at, choice in found if at == k) == possible[:cap]


def test_the_trunks_own_outcome_gets_no_fork() -> None:
    assert forks_of(np.array([[0.0, 0.2], [0.7, 0.1]])) == [(0, 1), (1, 1)]


@given(st.lists(st.integers(0, 8), min_size=1, max_size=5), st.data())
def test_forks_are_chosen_for_each_request_by_itself(most: list[int], data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(2, 5)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    chances = rng.random((len(most), *shape))
    together = choose_forks(chances, np.array(most))
    assert (np.diff(together.request) >= 0).all()
    for i, count in enumerate(most):
        of_one = together.where(together.request == i)
        found = list(zip(of_one.k.tolist(), of_one.choice.tolist(), strict=True))
        assert found == forks_of(chances[i], count)
        assert of_one.chance.tolist() == [chances[i][outcome] for outcome in found]


# ---- how many


@given(chance_tables, st.lists(st.floats(0.1, 3.0), min_size=1, max_size=20), st.floats(0.0, 0.5))
def test_the_number_of_forks_has_the_most_expected_tokens(
    chances: Float64Array, worth: list[float], own: float
) -> None:
    worth.sort(reverse=True)  # more branches are never deeper
    chances[:, 0] = 0.0
    chances[-1, 0] = own
    by_chance = [chances[outcome] for outcome in forks_of(chances)]
    forks = choose_forks(chances[None], np.array([100]), np.array([worth]))
    expected = [
        (own + sum(by_chance[:i])) * worth[i] for i in range(min(len(worth), len(by_chance) + 1))
    ]
    assert expected[len(forks.k)] == pytest.approx(max(expected))


# ---- the caps of the paper


@pytest.mark.parametrize(
    ("fan_out", "verified", "caps"),
    [
        ((3, 2, 1), 2, (3, 2, 1)),
        ((3, 2, 1), 0, (6,)),
        ((2, 2, 2), 1, (3, 3)),
        ((0, 0, 4), 1, (2, 2)),
    ],
)
def test_guesses_of_impossible_outcomes_go_to_possible_ones(
    fan_out: tuple[int, ...], verified: int, caps: tuple[int, ...]
) -> None:
    assert caps_for(fan_out, verified) == caps


@given(depths, fan_outs, acceptances, miss_exponents)
def test_geometric_fan_out_keeps_the_sum_of_the_uniform_one(
    depth: int, fan_out: int, acceptance: float, miss_exponent: float
) -> None:
    per_k = geometric_fan_out(depth, fan_out, acceptance, miss_exponent)
    assert len(per_k) == depth + 1
    assert sum(per_k) == fan_out * (depth + 1)
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
