"""How many guesses there may be after each number of accepted tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.core.forks import geometric_fan_out, uniform_fan_out

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
