"""The number of drafted tokens to verify, against trying all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, product
from operator import mul

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.core.lengths import Lengths, Verified
from vllm_ssd.core.step_times import Forecast

K = 4
a_chance = st.floats(0.01, 1.0)
a_request = st.lists(a_chance, min_size=1, max_size=3)


def yielded(chances: Sequence[Sequence[float]], counts: Sequence[int]) -> float:
    """The expected tokens of a step, one for each request included."""
    pairs = zip(chances, counts, strict=True)
    return len(chances) + sum(sum(accumulate(of[:count], mul)) for of, count in pairs)


def choose(
    lengths: Lengths, stated: Sequence[Sequence[float]], price: float, once: float, depth: int
) -> list[int]:
    """Both rules."""
    firsts = [of[0] for of in stated if of]
    if not lengths.pays(firsts, price, once, depth):
        return [0] * len(stated)
    return lengths.choose(stated, price)


@settings(max_examples=200)
@given(
    st.lists(a_request, min_size=1, max_size=4),
    st.floats(0.01, 0.1),
    st.floats(0.0, 0.03),
)
def test_repeated_it_leads_to_the_best_choice(
    stated: list[list[float]], base: float, each: float
) -> None:
    def rate(counts: Sequence[int]) -> float:
        return yielded(stated, counts) / (base + each * sum(counts))

    lengths, now = Lengths(), rate([0] * len(stated))
    for _ in range(20):
        now = rate(lengths.choose(stated, now * each))
    every = product(*(range(len(of) + 1) for of in stated))
    assert now == pytest.approx(max(map(rate, every)))


@pytest.mark.parametrize("requests", [1, 4, 32])
@pytest.mark.parametrize("each", [0.0003, 0.001, 0.004])
@pytest.mark.parametrize("more", [0.0, 0.004])
def test_it_gets_within_a_hundredth_of_the_best_cut(
    requests: int, each: float, more: float
) -> None:
    """Rounds of different chances and R smoothed, against the best fixed least chance."""
    forecast = Forecast(0.030, 0.030 + more, each)
    chance, lengths = np.random.default_rng(0), Lengths()
    rounds = [chance.beta(2.0, 1.0, (requests, K)).tolist() for _ in range(1500)]

    def took(counts: Sequence[int]) -> float:
        return forecast.of(sum(counts))

    def speed(least: float) -> float:
        tokens = seconds = 0.0
        for stated in rounds:
            cut = [sum(c >= least for c in accumulate(of, mul)) for of in stated]
            tokens += yielded(stated, cut)
            seconds += took(cut)
        return tokens / seconds

    tokens = seconds = gained = spent = 0.0
    for number, stated in enumerate(rounds):
        now = tokens / seconds if seconds else 0.0
        once = now * (forecast.base - forecast.plain)
        counts = choose(lengths, stated, now * each, once, K)
        one, of = yielded(stated, counts), took(counts)
        tokens += 0.1 * (one - tokens)
        seconds += 0.1 * (of - seconds)
        if number >= 50:
            gained += one
            spent += of
    assert gained / spent > 0.985 * max(map(speed, np.linspace(0.0, 1.01, 40).tolist()))


def test_nothing_is_verified_where_a_plain_step_yields_more() -> None:
    assert choose(Lengths(), [[0.3, 0.1]], 0.05, 0.6, 2) == [0]
    assert choose(Lengths(), [[0.9, 0.8]], 0.05, 0.6, 2) == [2]
    assert choose(Lengths(), [[0.9, 0.8], [0.1], []], 0.2, 0.6, 2) == [2, 0, 0]


def test_everything_is_verified_while_the_price_is_not_known() -> None:
    assert choose(Lengths(), [[0.5] * 6, [], [0.01]], 0.0, 0.0, 6) == [6, 0, 1]


@settings(max_examples=500)
@given(
    st.lists(a_request, min_size=1, max_size=9),
    st.floats(0.0, 1.0),
    st.floats(-1.0, 3.0),
    st.lists(a_chance, max_size=3),
    st.data(),
)
def test_what_follows_a_sampled_token_does_not_decide_whether_it_is_verified(
    stated: list[list[float]], price: float, once: float, others: list[float], data: st.DataObject
) -> None:
    # The chances of later tokens say which token was sampled: a proposal cut for them would be
    # biased, and so would be what is written.
    request = data.draw(st.integers(0, len(stated) - 1))
    at = data.draw(st.integers(0, len(stated[request]) - 1))
    changed = [list(of) for of in stated]
    changed[request][at + 1 :] = others
    before, after = (choose(Lengths(), of, price, once, K) for of in (stated, changed))
    assert (before[request] > at) == (after[request] > at)
    # Nor does it decide about other requests.
    assert before[:request] + before[request + 1 :] == after[:request] + after[request + 1 :]


def test_what_usually_follows_a_first_token_is_learned() -> None:
    good, bad = Lengths(), Lengths()
    for _ in range(100):
        good.observe([Verified([0.8, 0.5, 0.5], 3)])
        bad.observe([Verified([0.8, 0.5, 0.5], 1)])
    assert good.onward.chance > 0.9
    assert bad.onward.chance < 0.1
    assert choose(good, [[0.8, 0.5, 0.5]], 0.1, 1.2, 3) == [3]
    assert choose(bad, [[0.8, 0.5, 0.5]], 0.1, 1.2, 3) == [0]


@pytest.mark.parametrize("chance", [float("nan"), float("inf"), -1.0, 2.0])
def test_no_chance_breaks_the_choice(chance: float) -> None:
    lengths = Lengths()
    for at in range(3):
        stated = [0.5] * 3
        stated[at] = chance
        for once in (0.0, 1.0):
            assert 0 <= choose(lengths, [stated], 0.1, once, 3)[0] <= 3
    lengths.observe([Verified([chance, 0.5], 1)])
