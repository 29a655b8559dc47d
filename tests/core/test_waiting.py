"""Waiting pays exactly where it raises the tokens per second."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.core.waiting import (
    TRIALS,
    Acceptance,
    Awaited,
    Delay,
    Price,
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
    gained = gains(Counter(requests), acceptance, Price(rate * verifying))
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
    assert patience(gains({}, 0.9, Price(0.0)), 100.0, 0.01) == 0.0


def test_what_verifying_costs_counts() -> None:
    one = {Awaited(1.0, 1): 1}
    assert gains(one, 0.5, Price(0.2)) == pytest.approx([0.3])
    assert gains(one, 0.5, Price(0.2, first=0.1)) == pytest.approx([0.2])
    assert gains({Awaited(1.0, 2): 3}, 0.5, Price(0.3)) == pytest.approx([0.6, 0.6])


def test_a_delay_is_tried_then_measured_then_tried_again_seldom() -> None:
    delay, worth, waits, late = Delay(), 0.010, 0, 0
    for _ in range(2000):
        if delay.seconds < worth:
            waits += 1
            delay.missed(worth)
        else:
            late += 1
            delay.too_long()
    assert waits >= TRIALS
    assert waits < TRIALS + 0.03 * 2000
    # It has become shorter: found out, and made use of.
    tried = 0
    for _ in range(200):
        if delay.seconds < worth:
            tried += 1
            delay.came(0.002)
        else:
            delay.too_long()
    assert tried > 50
    assert delay.seconds == pytest.approx(0.002, rel=0.2)


def test_acceptance_is_learned_and_tried_again() -> None:
    learned = Acceptance()
    assert learned.chance == 0.5
    for _ in range(300):
        learned.observe(1, 3)
    assert learned.chance == pytest.approx(0.25, abs=0.02)
    for _ in range(1000):
        learned.not_tried()
    assert learned.chance == pytest.approx(0.5, abs=0.02)
