"""The chances of outcomes above temperature 0, against what comes true in a simulated world."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_ssd.core.arms import Settings, arms_of
from vllm_ssd.core.arrays import Float32Array, Float64Array
from vllm_ssd.core.outcomes import OutcomeModel
from vllm_ssd.core.sampled_outcomes import Ends, Verifications
from vllm_ssd.core.setting_outcomes import SettingOutcomes, choice_of

CHOICES, DEPTH, VOCABULARY = 4, 2, 6
SETTINGS = Settings(arms_of("auto", -1.0))
GREEDY_ARM, PLAIN, LIGHT = SETTINGS.of(2, 0), SETTINGS.of(2, 1), SETTINGS.of(2, 4)
"""At temperature 1: first choices, samples, and samples with C = 0."""
WEIGHED = 2


class World:
    """A draft and a target that agree in part; what they say at a position is random.

    Args:
        seed: of its random numbers.
        setting: how tokens are drafted.
    """

    def __init__(self, seed: int, setting: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.setting = setting

    def verify(self, count: int) -> tuple[Verifications, Ends]:
        """Some verifications of K tokens each, and how they end."""
        shape = count, DEPTH + 1
        q = np.sort(self.rng.dirichlet(np.full(VOCABULARY, 0.6), shape))[..., ::-1].copy()
        p = 0.7 * q + 0.3 * self.rng.dirichlet(np.full(VOCABULARY, 0.6), shape)
        proposal = self._proposal(q)
        drafted = self._draw(proposal)
        drafted[:, DEPTH] = 0  # the guess
        own = np.take_along_axis(proposal, drafted[..., None], -1)[..., 0]
        ratio = np.take_along_axis(p, drafted[..., None], -1)[..., 0] / own
        right = self.rng.random(shape) < ratio
        right[:, DEPTH] = False
        accepted = right.argmin(axis=1)
        residual = np.maximum(p - proposal, 0.0)
        residual[:, DEPTH] = p[:, DEPTH]
        at = np.arange(count), accepted
        came = self._draw(residual[at] / residual[at].sum(-1, keepdims=True))
        stated = (q / q[..., :CHOICES].sum(-1, keepdims=True))[..., :CHOICES].astype(np.float32)
        certain = self.setting == GREEDY_ARM
        own = np.zeros(shape) if certain else own
        own[:, DEPTH] = 0.0
        weighed = np.zeros(stated.shape, np.bool_)
        if self.setting == LIGHT:
            weighed[:, :DEPTH, :WEIGHED] = True
        tokens = np.broadcast_to(np.arange(CHOICES, dtype=np.int32), stated.shape)
        trunks = Verifications(
            np.full(count, self.setting, np.int32),
            np.full(count, DEPTH),
            np.full(count, DEPTH + 1),
            stated,
            choice_of(tokens, drafted.astype(np.int32)),
            own.astype(np.float32),
            proposal.max(-1).astype(np.float32),
            weighed,
        )
        seen = np.arange(DEPTH + 1) <= accepted[:, None]
        return trunks, Ends(accepted, np.where(came < CHOICES, came, -1), seen)

    def _proposal(self, q: Float64Array) -> Float64Array:
        if self.setting == GREEDY_ARM:
            return np.eye(VOCABULARY)[np.zeros(q.shape[:-1], np.int64)]
        lighter = q.copy()
        if self.setting == LIGHT:
            lighter[..., :WEIGHED] = 1e-12
        proposal: Float64Array = lighter / lighter.sum(-1, keepdims=True)
        return proposal

    def _draw(self, p: Float64Array) -> NDArray[np.int64]:
        below = p.cumsum(-1) < self.rng.random(p.shape[:-1])[..., None]
        drawn: NDArray[np.int64] = np.minimum(below.sum(-1), VOCABULARY - 1)
        return drawn


def learned(setting: int) -> tuple[SettingOutcomes, World]:
    """A model that has seen some thousand verifications."""
    model, world = SettingOutcomes(CHOICES, SETTINGS), World(1, setting)
    for _ in range(400):
        model.observe(*world.verify(16))
    return model, world


def outcomes(trunks: Verifications, ends: Ends) -> Float64Array:
    """``[B, K + 1, C]``, 1 for what came true."""
    true = np.zeros(trunks.stated.shape)
    came = ends.came >= 0
    true[np.flatnonzero(came), ends.accepted[came], ends.came[came]] = 1.0
    return true


@pytest.mark.parametrize("setting", [GREEDY_ARM, PLAIN, LIGHT])
def test_outcomes_come_true_as_often_as_their_chances_say(setting: int) -> None:
    model, world = learned(setting)
    trunks, ends = world.verify(20_000)
    chances, true = model.chances(trunks), outcomes(trunks, ends)
    for k in range(DEPTH + 1):
        estimated, actual = chances[:, k].sum(1).mean(), true[:, k].sum(1).mean()
        assert estimated == pytest.approx(actual, abs=0.04)
    for low, high in ((0.02, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.5)):
        some = (chances >= low) & (chances < high)
        assert true[some].mean() == pytest.approx(chances[some].mean(), rel=0.4)


@pytest.mark.parametrize("setting", [PLAIN, LIGHT])
def test_tokens_are_accepted_as_often_as_the_shape_of_q_says(setting: int) -> None:
    model, world = learned(setting)
    trunks, ends = world.verify(20_000)
    first = trunks.likeliest[:, 0]
    said = model.acceptance_of(
        trunks.setting, trunks.stated[:, 0, 0], np.ones(len(first), np.bool_), first
    )
    accepted = ends.accepted > 0
    for low, high in ((0.3, 0.5), (0.5, 0.7), (0.7, 0.9)):
        some = (first >= low) & (first < high)
        assert said[some].mean() == pytest.approx(accepted[some].mean(), abs=0.06)


def test_what_is_said_of_a_sampled_token_does_not_depend_on_the_sample() -> None:
    model, _ = learned(PLAIN)
    said = model.acceptance_of(
        np.full(2, PLAIN, np.int32),
        np.array([0.6, 0.6], np.float32),
        np.ones(2, np.bool_),
        np.array([0.6, 0.6], np.float32),
    )
    assert said[0] == said[1]


def test_forks_go_to_the_weighed_tokens() -> None:
    model, world = learned(LIGHT)
    trunks, _ = world.verify(2000)
    first = model.chances(trunks)[:, 0]
    assert first[:, :WEIGHED].sum() > 3.0 * first[:, WEIGHED:].sum()


def test_settings_learn_apart() -> None:
    model, world = SettingOutcomes(CHOICES, SETTINGS), World(1, LIGHT)
    other = SETTINGS.of(1, 1)
    trunks, _ = World(2, PLAIN).verify(5)
    elsewhere = trunks._replace(setting=np.full(5, other, np.int32))
    before = model.chances(elsewhere)
    for _ in range(50):
        model.observe(*world.verify(16))
    assert (model.chances(elsewhere) == before).all()


@given(st.integers(0, 10**6), st.integers(0, DEPTH))
def test_the_trunks_own_token_cannot_follow_its_own_rejection(seed: int, n: int) -> None:
    model, world = SettingOutcomes(CHOICES, SETTINGS), World(seed, PLAIN)
    model.observe(*world.verify(30))
    trunks, _ = world.verify(20)
    trunks = trunks._replace(verified=np.full(20, n))
    found = model.chances(trunks)
    assert (found >= 0.0).all()
    assert (found.sum(axis=(1, 2)) <= 1.0 + 1e-9).all()
    for k in range(n):
        held = trunks.choice[:, k] >= 0
        assert (found[np.flatnonzero(held), k, trunks.choice[held, k]] == 0.0).all()
    assert (found[:, n + 1 :] == 0.0).all()


def _stated(rng: np.random.Generator, count: int) -> Float32Array:
    q = np.sort(rng.dirichlet(np.ones(CHOICES), (count, DEPTH + 1)))[..., ::-1]
    return q.astype(np.float32)


def test_greedy_requests_have_the_numbers_of_their_own_model() -> None:
    # Beside requests with a temperature, and without.
    rng, world = np.random.default_rng(0), World(1, PLAIN)
    model, alone = SettingOutcomes(CHOICES, SETTINGS), OutcomeModel(CHOICES)
    for i in range(60):
        stated = _stated(rng, 5)
        accepted = rng.integers(0, DEPTH + 1, 5)
        came = np.where(accepted < DEPTH, rng.integers(1, CHOICES, 5), rng.integers(-1, CHOICES, 5))
        seen = np.arange(DEPTH + 1) <= accepted[:, None]
        nothing = np.zeros((5, DEPTH + 1))
        greedy = Verifications(
            np.zeros(5, np.int32),
            np.full(5, DEPTH),
            np.full(5, DEPTH + 1),
            stated,
            nothing.astype(np.int64),
            nothing.astype(np.float32),
            nothing.astype(np.float32),
            np.zeros(stated.shape, np.bool_),
        )
        ends = Ends(accepted, came, seen)
        by_position = np.where(np.arange(DEPTH + 1) < accepted[:, None], 0, came[:, None])
        alone.observe(stated[seen], by_position[seen])
        mixed = i % 2 and world.verify(3)
        if mixed:
            others, their_ends = mixed
            both: Any = zip(greedy, others, strict=True)
            greedy = Verifications._make(np.concatenate(pair) for pair in both)
            both = zip(ends, their_ends, strict=True)
            ends = Ends._make(np.concatenate(pair) for pair in both)
        model.observe(greedy, ends)
        expected = alone.chances(np.full(5, DEPTH), np.full(5, DEPTH + 1), stated)
        assert (model.chances(greedy)[:5] == expected).all()
