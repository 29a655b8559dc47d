"""Which way to draft is found to be the best, at what cost, and how soon a change is followed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from vllm_ssd.core.arms import BLOCK, LEVELS, Arm, BestArm, Block, Settings, arms_of, level_of

Rates = Callable[[int], Sequence[float]]
"""Tokens per second of each arm at the i-th block."""


def play(
    best: BestArm, blocks: int, rates: Rates, seed: int, at_once: int = 1, spread: float = 0.15
) -> list[int]:
    """The arms chosen, with blocks whose rates scatter as those of 32 verifications do.

    Args:
        best: the learner.
        blocks: how many are played.
        rates: the true ones.
        seed: of the scatter.
        at_once: requests side by side, which choose before the others have reported.
        spread: of a block's rate, in parts of it.
    """
    rng = random.Random(seed)
    chosen: list[int] = []
    for start in range(0, blocks, at_once):
        arms = [best.choose() for _ in range(at_once)]
        for arm in arms:
            rate = max(1.0, rates(start)[arm] * rng.gauss(1.0, spread))
            best.observe(block(arm, rate))
        chosen += arms
    return chosen


def block(arm: int, rate: float, verifications: int = BLOCK) -> Block:
    """A block that yields two tokens a verification, at a rate."""
    played = Block(arm)
    for _ in range(verifications):
        played.observe(2, 3, 2.0 / rate)
    return played


def cost(chosen: Sequence[int], rates: Sequence[float]) -> float:
    """The share of the tokens that is lost against the best arm alone."""
    return 1.0 - sum(rates[arm] for arm in chosen) / (len(chosen) * max(rates))


# ---- arms and settings


def test_the_options_say_which_arms_there_are() -> None:
    greedy = Arm(False, 1.0)
    assert arms_of("greedy", -1.0) == (greedy,)
    assert arms_of("probabilistic", 0.4) == (Arm(True, 0.4),)
    assert arms_of("auto", 1.0) == (greedy, Arm(True, 1.0))
    names = [arm.name for arm in arms_of("auto", -1.0)]
    assert names == ["greedy", "c_1", "c_0.6", "c_0.3", "c_0"]


def test_each_level_and_arm_is_a_setting_of_its_own() -> None:
    settings = Settings(arms_of("auto", -1.0))
    numbers = {settings.of(level, arm) for level in range(LEVELS) for arm in range(5)}
    assert numbers == set(range(1, settings.count))


def test_near_temperatures_share_a_level() -> None:
    levels = [level_of(t) for t in (0.01, 0.4, 0.5, 0.7, 0.8, 1.0, 1.2, 1.5, 9.0)]
    assert levels == [0, 0, 0, 1, 1, 2, 2, 3, 3]


# ---- blocks


def test_a_block_after_a_change_leaves_out_what_was_drafted_before() -> None:
    first = block(0, 10.0)
    assert first.full
    assert first.counted == BLOCK
    changed, same = first.next(1), first.next(0)
    for played in (changed, same):
        for _ in range(BLOCK):
            played.observe(2, 3, 0.1)
    assert changed.counted < same.counted == BLOCK
    assert changed.tokens == 2 * changed.counted


@pytest.mark.parametrize(("drafted", "seconds"), [(0, 0.1), (3, 0.0)])
def test_nothing_is_learned_without_drafts_or_times(drafted: int, seconds: float) -> None:
    best = BestArm(2, seed=1)
    play(best, 40, lambda _: (10.0, 12.0), seed=1)
    before = best._rate.copy(), best._weight.copy()
    silent = Block(0)
    for _ in range(BLOCK):
        silent.observe(1, drafted, seconds)
    best.observe(silent)
    assert (best._rate, best._weight) == before


def test_the_mean_of_an_arm_is_that_of_its_blocks() -> None:
    best = BestArm(2, seed=1)
    rates = [8.0, 12.0, 10.0]
    for rate in rates:
        best.observe(block(0, rate))
    assert best._rate[0] == pytest.approx(10.0, rel=0.01)
    # A short block counts for less.
    best.observe(block(0, 20.0, BLOCK // 4))
    assert best._rate[0] == pytest.approx((30.0 + 0.25 * 20.0) / 3.25, rel=0.01)


# ---- the choice


def test_a_single_arm_needs_no_learning() -> None:
    best = BestArm(1, seed=1)
    assert play(best, 50, lambda _: (10.0,), seed=1) == [0] * 50


def test_all_arms_get_their_first_blocks_even_if_many_ask_at_once() -> None:
    best = BestArm(5, seed=1)
    assert sorted(best.choose() for _ in range(15)) == sorted([*range(5)] * 3)


@pytest.mark.parametrize("at_once", [1, 16])
@pytest.mark.parametrize("better", [0, 1])
def test_an_arm_five_percent_better_is_found_and_kept(better: int, at_once: int) -> None:
    rates = [10.0, 10.0]
    rates[better] = 10.5
    kept = lost = 0.0
    for seed in range(10):
        best = BestArm(2, seed)
        play(best, 400, lambda _: rates, seed, at_once)
        later = play(best, 1600, lambda _: rates, seed + 100, at_once)
        kept += later.count(better) / len(later) / 10
        lost += cost(later, rates) / 10
    assert kept > 0.8
    assert lost < 0.01


def test_trying_others_is_cheap_once_the_best_is_known() -> None:
    rates = (9.0, 11.0, 10.0, 9.0, 7.0)
    lost = 0.0
    for seed in range(10):
        best = BestArm(5, seed)
        play(best, 300, lambda _: rates, seed)
        lost += cost(play(best, 1500, lambda _: rates, seed + 100), rates) / 10
    assert lost < 0.015


def test_a_change_is_followed() -> None:
    for seed in range(10):
        best = BestArm(2, seed)
        play(best, 600, lambda _: (12.0, 10.0), seed)
        play(best, 400, lambda _: (10.0, 12.0), seed + 100)
        later = play(best, 300, lambda _: (10.0, 12.0), seed + 200)
        assert later.count(1) > 0.9 * len(later)


def test_a_load_that_slows_all_arms_down_does_not_change_the_choice_for_long() -> None:
    for seed in range(10):
        best = BestArm(2, seed)
        play(best, 400, lambda _: (12.0, 10.0), seed)
        play(best, 60, lambda _: (3.0, 2.5), seed + 100)
        later = play(best, 300, lambda _: (3.0, 2.5), seed + 200)
        assert later.count(0) > 0.85 * len(later)


def test_tokens_that_cost_more_than_they_bring_make_an_arm_worse() -> None:
    def best(price: float) -> int:
        best = BestArm(2, "seed")
        for arm, tokens, drafted in ((0, 2, 1), (1, 3, 4)) * 20:
            played = Block(arm)
            for _ in range(BLOCK):
                played.observe(tokens, drafted, 0.1, price)
            best.observe(played)
        chosen = [best.choose() for _ in range(20)]
        return max(set(chosen), key=chosen.count)

    assert best(0.0) == 1
    assert best(0.5) == 0


def test_what_a_rejected_proposal_cost_counts_in_full() -> None:
    # One or seven tokens of six drafted, or always three of two: 1.9 and 2.3 at a price of 0.35.
    best = BestArm(2, "seed")
    for _ in range(20):
        risky, safe = Block(0), Block(1)
        for turn in range(BLOCK):
            risky.observe(1 + 6 * (turn % 2), 6, 0.1, 0.35)
            safe.observe(3, 2, 0.1, 0.35)
        best.observe(risky)
        best.observe(safe)
    assert [best.choose() for _ in range(20)].count(1) > 15
