"""The number of drafted tokens to verify, against trying all of them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.core.lengths import Correction, Lengths, choose_lengths, cumulative
from vllm_ssd.core.step_times import Forecast

forecasts = st.builds(
    lambda plain, more, each: Forecast(plain, plain + more, each),
    st.floats(0.01, 0.1),
    st.floats(-0.005, 0.03),
    st.floats(0.0, 0.02),
)
a_request = st.lists(st.floats(0.01, 1.0), max_size=3)


def rate(requests: int, chances: list[list[float]], counts: list[int], of: Forecast) -> float:
    """Expected tokens per second."""
    tokens = requests + sum(sum(c[:n]) for c, n in zip(chances, counts, strict=True))
    return tokens / (of.of(sum(counts)) + 0.001)


@settings(max_examples=300)
@given(st.lists(a_request, min_size=1, max_size=4), st.integers(0, 3), forecasts)
def test_no_other_choice_yields_more(
    stated: list[list[float]], others: int, forecast: Forecast
) -> None:
    chances = [cumulative(of) for of in stated]
    requests = len(chances) + others
    chosen = choose_lengths(requests, chances, forecast, 0.001)
    every = product(*(range(len(of) + 1) for of in chances))
    best = max(rate(requests, chances, list(counts), forecast) for counts in every)
    assert rate(requests, chances, chosen.counts, forecast) == pytest.approx(best)
    assert chosen.rate == pytest.approx(best)
    everything = [len(of) for of in chances]
    if sum(everything):
        assert chosen.rate_of_all == pytest.approx(rate(requests, chances, everything, forecast))


many = st.lists(st.lists(st.floats(0.01, 1.0), max_size=6), min_size=20, max_size=40)


@settings(max_examples=100)
@given(many, forecasts)
def test_for_many_requests_no_other_number_of_tokens_yields_more(
    stated: list[list[float]], forecast: Forecast
) -> None:
    chances = [cumulative(of) for of in stated]
    requests = len(chances)
    chosen = choose_lengths(requests, chances, forecast, 0.001)
    ranked = sorted((c for of in chances for c in of), reverse=True)
    rates = [
        (requests + sum(ranked[:m])) / (forecast.of(m) + 0.001) for m in range(len(ranked) + 1)
    ]
    assert rate(requests, chances, chosen.counts, forecast) == pytest.approx(max(rates))


@settings(max_examples=100)
@given(many, forecasts)
def test_loops_and_arrays_agree_with_what_was_learned(
    stated: list[list[float]], forecast: Forecast
) -> None:
    lengths = Lengths()
    lengths.observe([[0.9, 0.8, 0.4]] * 50, [1] * 50)
    chosen = lengths.choose(len(stated), stated, forecast, 0.001)
    chances = [[lengths.correction.of(c) for c in cumulative(of)] for of in stated]
    assert chosen.rate == pytest.approx(
        choose_lengths(len(stated), chances, forecast, 0.001).rate, rel=1e-6
    )


def test_nothing_is_verified_where_a_plain_step_yields_more() -> None:
    forecast = Forecast(0.030, 0.050, 0.001)
    assert choose_lengths(1, [[0.3, 0.1]], forecast).counts == [0]
    assert choose_lengths(1, [[0.9, 0.8]], forecast).counts == [2]


def test_the_probable_request_gets_more_tokens() -> None:
    forecast = Forecast(0.030, 0.030, 0.010)
    chosen = choose_lengths(2, [[0.95, 0.9, 0.8], [0.4, 0.1, 0.05]], forecast)
    assert chosen.counts == [3, 0]


def test_everything_is_verified_while_no_time_is_known() -> None:
    unknown = Forecast(0.0, 0.0, 0.0)
    assert Lengths().choose(3, [[0.5] * 6, [], [0.01]], unknown).counts == [6, 0, 1]


def test_a_choice_does_not_depend_on_tokens() -> None:
    """Chances are all that is given: two requests with the same ones get the same number."""
    chosen = Lengths().choose(4, [[0.7, 0.6]] * 4, Forecast(0.03, 0.031, 0.004))
    assert len(set(chosen.counts)) == 1


@settings(max_examples=500)
@given(
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3), min_size=1, max_size=9),
    forecasts,
    st.lists(st.floats(0.01, 1.0), max_size=3),
    st.data(),
)
def test_what_follows_a_sampled_token_does_not_decide_whether_it_is_verified(
    stated: list[list[float]], forecast: Forecast, others: list[float], data: st.DataObject
) -> None:
    # The chances of later tokens say which token was sampled: a proposal cut for them would be
    # biased, and so would be what is written.
    request = data.draw(st.integers(0, len(stated) - 1))
    at = data.draw(st.integers(0, len(stated[request]) - 1))
    changed = [list(of) for of in stated]
    changed[request][at + 1 :] = others
    verified = [
        Lengths().choose(len(stated), of, forecast, 0.001, sampled=True).counts[request] > at
        for of in (stated, changed)
    ]
    assert verified[0] == verified[1]


def test_chances_are_corrected_by_what_came_true() -> None:
    correction, chance = Correction(), np.random.default_rng(0)
    said = chance.uniform(0.0, 1.0, 5000)
    correction.observe(said.tolist(), (chance.random(5000) < said**2).tolist())
    for at in (0.3, 0.6, 0.75, 0.95):
        assert correction.of(at) == pytest.approx(at**2, abs=0.06)
    grid = np.linspace(0.0, 1.0, 101)
    corrected = correction.of_all(grid)
    assert (np.diff(corrected) >= 0.0).all()
    assert [correction.of(c) for c in grid.tolist()] == pytest.approx(corrected.tolist())
    assert corrected[0] >= 0.0
    assert corrected[-1] <= 1.0


def test_at_first_the_drafts_own_chances_count() -> None:
    correction = Correction()
    for chance in (0.0, 0.07, 0.5, 0.99, 1.0):
        assert correction.of(chance) == pytest.approx(chance, abs=1e-6)


@pytest.mark.parametrize("chance", [float("nan"), float("inf"), -1.0, 2.0])
def test_no_chance_breaks_the_choice(chance: float) -> None:
    lengths, forecast = Lengths(), Forecast(0.03, 0.03, 0.001)
    for requests in (1, 32):
        counts = lengths.choose(requests, [[0.5, chance, 0.5]] * requests, forecast).counts
        assert all(0 <= count <= 3 for count in counts)
    lengths.observe([[chance, 0.5]], [1])


def test_what_nobody_states_is_learned() -> None:
    lengths = Lengths()
    for _ in range(300):
        lengths.observe_unstated(2, 1)
    assert lengths.usual == pytest.approx(0.5, abs=0.05)
