"""The figures of ``benchmarks/forks.py``: repeatable, and what they must be where that is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.forks import CHOICES, Draft, hit_rate, policies

DEPTH = 3
LENGTH = 60


def drafts(right: float, seed: int = 0) -> list[Draft]:
    """Three answers to a draft whose first choice is right that often, else its second."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(3):
        answer = rng.integers(100, 200, LENGTH).astype(np.int32)
        choices = np.tile(np.arange(CHOICES, dtype=np.int32), (LENGTH, DEPTH + 1, 1))
        for at in range(LENGTH):
            for k in range(min(DEPTH + 1, LENGTH - at)):
                # The same at every distance, as of a draft that goes on greedily.
                first = (int(answer[at + k]) * 7919) % 1000 < 1000 * right
                choices[at, k, 0 if first else 1] = answer[at + k]
        stated = np.full((LENGTH, DEPTH + 1, CHOICES), 0.3 / (CHOICES - 1), np.float32)
        stated[..., 0] = 0.7
        made.append(Draft(answer, choices, stated))
    return made


@pytest.mark.parametrize("name", policies(DEPTH))
def test_two_runs_give_the_same_figures_to_the_last_digit(name: str) -> None:
    runs = [hit_rate(drafts(0.6), policies(DEPTH)[name](), 6) for _ in range(2)]
    assert runs[0] == runs[1]
    assert 0.0 < runs[0][0] <= 1.0


@pytest.mark.parametrize("name", policies(DEPTH))
def test_a_draft_that_is_always_right_always_hits(name: str) -> None:
    hits, tokens = hit_rate(drafts(1.0), policies(DEPTH)[name](), 1)
    assert hits == 1.0
    assert tokens > DEPTH


def test_more_branches_hit_more_often() -> None:
    rates = [hit_rate(drafts(0.6), policies(DEPTH)["uniform"](), n)[0] for n in (1, 4, 8)]
    assert rates[0] < rates[1] <= rates[2]
    # Every outcome is the first or the second choice.
    assert rates[2] == 1.0
