"""Waiting pays exactly where it raises the tokens per second."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.core.waiting import (
    TRIALS,
    Awaited,
    Delay,
    gains,
    patience,
)

chances = st.floats(0.05, 1.0)
some_requests = st.lists(st.builds(Awaited, chances, st.integers(1, 4)), min_size=1, max_size=4)


@given(
    some_requests,
    chances,
    st.floats(1.0, 50.0),
    st.floats(1e-3, 0.2),
    st.floats(0.0, 0.02),
    st.floats(0.0, 0.02),
    st.floats(0.0, 0.005),
)
def test_waiting_pays_where_some_number_of_tokens_makes_the_engine_faster(
    requests: list[Awaited],
    acceptance: float,
    tokens: float,
    seconds: float,
    first: float,
    following: float,
    verifying: float,
) -> None:
    rate = tokens / seconds
    gained = gains(Counter(requests), acceptance, rate * verifying)
    # By hand: all that a step yields over all that it takes, for each number of tokens.
    fastest = rate
    for more in range(1, max(request.missing for request in requests) + 1):
        yielded, taken = tokens, seconds + first + (more - 1) * following
        for reached, missing in requests:
            for at in range(1, min(more, missing) + 1):
                chance = reached * acceptance**at
                if chance > rate * verifying:  # else it is not verified
                    yielded += chance
                    taken += verifying
        fastest = max(fastest, yielded / taken)
    worth = patience(gained, rate, following)
    if abs(worth - first) > 1e-6:
        assert (first < worth) == (fastest > rate * (1 + 1e-12))


def test_nothing_is_worth_waiting_for_where_nothing_is_missing() -> None:
    assert patience(gains({}, 0.9, 0.0), 100.0, 0.01) == 0.0


def test_what_verifying_costs_counts() -> None:
    one = {Awaited(1.0, 1): 1}
    assert gains(one, 0.5, 0.2) == pytest.approx([0.3])
    assert gains({Awaited(1.0, 2): 3}, 0.5, 0.3) == pytest.approx([0.6, 0.6])


def test_a_delay_is_tried_then_measured() -> None:
    delay, worth = Delay(), 0.010
    for _ in range(TRIALS):
        assert delay.seconds < worth
        delay.missed(worth)
    assert delay.seconds > worth
    for _ in range(20):
        delay.came(0.002)
    assert delay.seconds == pytest.approx(0.002, rel=0.2)


def test_one_token_that_is_late_is_an_accident_several_are_not() -> None:
    delay = Delay()
    for _ in range(50):
        delay.came(0.004)
    delay.missed(0.010)
    assert delay.seconds < 0.010
    for _ in range(4):
        delay.missed(0.010)
    assert delay.seconds > 0.010
