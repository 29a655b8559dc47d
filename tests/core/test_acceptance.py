"""Chances of acceptance, corrected and learned."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_ssd.core.acceptance import Acceptance, Correction


def test_chances_are_corrected_by_what_came_true() -> None:
    correction, chance = Correction(), np.random.default_rng(0)
    said = chance.uniform(0.0, 1.0, 5000)
    correction.observe(said.tolist(), (chance.random(5000) < said**2).tolist())
    for at in (0.3, 0.6, 0.75, 0.95):
        assert correction.of(at) == pytest.approx(at**2, abs=0.1)
    corrected = [correction.of(c) for c in np.linspace(0.0, 1.0, 101).tolist()]
    assert (np.diff(corrected) >= 0.0).all()
    assert corrected[0] >= 0.0
    assert corrected[-1] <= 1.0


def test_the_least_chance_is_the_one_from_which_on_it_is_enough() -> None:
    correction, chance = Correction(), np.random.default_rng(1)
    said = chance.uniform(0.0, 1.0, 2000)
    correction.observe(said.tolist(), (chance.random(2000) < 0.7 * said).tolist())
    for wanted in np.linspace(0.01, 0.6, 60).tolist():
        least = correction.least(wanted)
        assert correction.of(least) == pytest.approx(wanted)
        assert correction.of(least - 1e-6) < wanted
    assert correction.least(0.0) == 0.0
    assert correction.least(1.1) == math.inf


def test_at_first_the_drafts_own_chances_count() -> None:
    correction = Correction()
    for chance in (0.0, 0.07, 0.5, 0.99, 1.0):
        assert correction.of(chance) == pytest.approx(chance, abs=1e-6)


def test_nothing_is_ever_certain() -> None:
    learned = Acceptance()
    learned.observe(100_000, 0)
    assert 0.95 < learned.chance < 1.0
    learned.observe(0, 100_000)
    assert 0.0 < learned.chance < 0.05


def test_what_is_assumed_counts_less_the_more_was_seen() -> None:
    learned = Acceptance()
    assert learned.given(0.9) == pytest.approx(0.9)
    learned.observe(0, 5)
    assert learned.given(0.9) == pytest.approx(0.45, abs=0.01)
    learned.observe(0, 200)
    assert learned.given(0.9) < 0.05


def test_acceptance_is_learned() -> None:
    learned = Acceptance()
    assert learned.chance == 0.5
    for _ in range(300):
        learned.observe(1, 3)
    assert learned.chance == pytest.approx(0.25, abs=0.02)
    for _ in range(300):
        learned.observe(3, 1)
    assert learned.chance == pytest.approx(0.75, abs=0.02)
