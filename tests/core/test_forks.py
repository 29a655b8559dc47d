"""Which outcomes get a fork, and how many do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.core.arrays import Float64Array
from vllm_ssd.core.forks import (
    Forks,
    best_count,
    caps_for,
    geometric_fan_out,
    likeliest_forks,
)

depths = st.integers(1, 10)
fan_outs = st.integers(1, 8)
acceptances = st.floats(0.05, 0.95)
miss_exponents = st.floats(0.1, 4.0)
some_chance = st.sampled_from([0.0, 0.01, 0.02, 0.05, 0.1])
chance_tables = st.integers(1, 7).flatmap(
    lambda rows: st.integers(2, 6).flatmap(
        lambda columns: st.lists(
            st.lists(
                st.sampled_from([0.0, 0.01, 0.02, 0.05, 0.1]), min_size=columns, max_size=columns
            ),
            min_size=rows,
            max_size=rows,
        ).map(np.array)
    )
)


def outcomes(forks: Forks) -> list[tuple[int, int]]:
    return list(zip(forks.k.tolist(), forks.choice.tolist(), strict=True))


# ---- the likeliest outcomes


@given(chance_tables, st.integers(0, 50))
def test_forks_are_the_likeliest_outcomes_whatever_their_k(
    chances: Float64Array, most: int
) -> None:
    forks = likeliest_forks(chances, most)
    by_hand = sorted(
        (float(chance) for row in chances for chance in row[1:] if chance), reverse=True
    )
    assert forks.chance.tolist() == by_hand[:most]
    assert [chances[outcome] for outcome in outcomes(forks)] == forks.chance.tolist()
    assert len(set(outcomes(forks))) == len(outcomes(forks))


@given(chance_tables, st.data())
def test_caps_bound_the_guesses_after_each_k(chances: Float64Array, data: st.DataObject) -> None:
    last = len(chances) - 1
    caps = data.draw(st.lists(st.integers(0, 4), min_size=last + 1, max_size=last + 1))
    found = outcomes(likeliest_forks(chances, 100, caps))
    for k, cap in enumerate(caps):
        # The trunk's own outcome is the first guess after all tokens.
        allowed = max(0, cap - (k == last))
        possible = [choice for choice in range(1, chances.shape[1]) if chances[k, choice]]
        assert sorted(choice for at, choice in found if at == k) == possible[:allowed]


def test_the_trunks_own_outcome_gets_no_fork() -> None:
    chances = np.array([[0.0, 0.2], [0.7, 0.1]])
    assert outcomes(likeliest_forks(chances, 9)) == [(0, 1), (1, 1)]


# ---- how many


@given(chance_tables, st.lists(st.floats(0.1, 3.0), min_size=1, max_size=20), st.floats(0.0, 0.5))
def test_the_number_of_forks_has_the_most_expected_tokens(
    chances: Float64Array, worth: list[float], own: float
) -> None:
    forks = likeliest_forks(chances, 100)
    count = best_count(forks, own, np.array(worth))
    expected = [
        (own + forks.chance[:i].sum()) * worth[i] for i in range(min(len(worth), len(forks.k) + 1))
    ]
    assert expected[count] == pytest.approx(max(expected))


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
def test_guesses_of_what_cannot_happen_go_to_what_can(
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
