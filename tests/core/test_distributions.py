"""The distributions beside the speculation cache: by row and position, forgotten with a row."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ssd.core import distributions as distributions_module
from vllm_ssd.core.arrays import Float32Array, Int32Array
from vllm_ssd.core.distributions import Distributions

ROWS, WIDTH, MOST = 4, 6, 3


def ints(*values: int) -> Int32Array:
    return np.array(values, np.int32)


def floats(*values: float) -> Float32Array:
    return np.array(values, np.float32)


@pytest.fixture
def kept() -> Distributions:
    """Row 1 has a sampled token at position 7, row 2 at 8."""
    distributions = Distributions(ROWS, WIDTH, MOST)
    distributions.sampled(
        ints(1, 2),
        ints(7, 8),
        ints(2, 1),
        ints(5, 9, 6),
        floats(0.25, 0.75, 1.0),
        ints(5, 6),
    )
    return distributions


def found(kept: Distributions, *places: tuple[int, int]) -> list[dict[int, float]]:
    """The distribution of each ``(row, position)``; empty where the token is certain."""
    rows, positions = np.array(places).T
    supports, tokens, values = kept.look_up(rows, positions)
    ends = supports.cumsum().tolist()
    return [
        dict(zip(tokens[end - n : end].tolist(), values[end - n : end].tolist(), strict=True))
        for end, n in zip(ends, supports.tolist(), strict=True)
    ]


def test_what_was_sampled_is_found_and_the_rest_is_certain(kept: Distributions) -> None:
    assert found(kept, (1, 7), (1, 8), (2, 8), (-1, 7)) == [
        {5: 0.25, 9: 0.75},
        {},
        {6: 1.0},
        {},
    ]


def test_a_smaller_distribution_replaces_a_larger_one(kept: Distributions) -> None:
    kept.sampled(ints(1), ints(7), ints(1), ints(4), floats(1.0), ints(4))
    assert found(kept, (1, 7)) == [{4: 1.0}]


def test_a_certain_token_replaces_a_sampled_one(kept: Distributions) -> None:
    kept.certain(ints(1, 2), np.array([[7, 7], [8, 9]], np.int32))
    assert found(kept, (1, 7), (2, 8)) == [{}, {6: 1.0}]


def test_positions_go_round(kept: Distributions) -> None:
    kept.sampled(ints(1), ints(7 + WIDTH), ints(3), ints(4, 3, 2), floats(0.5, 0.25, 0.25), ints(4))
    assert found(kept, (1, 7 + WIDTH)) == [{4: 0.5, 3: 0.25, 2: 0.25}]


def test_a_row_that_begins_anew_forgets(kept: Distributions) -> None:
    kept.forget([1])
    assert found(kept, (1, 7), (2, 8)) == [{}, {6: 1.0}]


def test_the_oldest_entries_make_room_for_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions_module, "_ENTRIES", 1)
    monkeypatch.setattr(distributions_module, "_STEPS", 1)
    kept = Distributions(ROWS, WIDTH, MOST)  # room for twelve entries
    entries = ints(3), ints(4, 5, 6), floats(0.5, 0.25, 0.25)
    full = {4: 0.5, 5: 0.25, 6: 0.25}
    for row in range(3):
        kept.sampled(ints(row), ints(7), *entries, ints(4))
    two = ints(2), ints(8, 9), floats(0.5, 0.5)
    kept.sampled(ints(3), ints(7), *two, ints(4))
    assert found(kept, (0, 7), (3, 7)) == [full, {8: 0.5, 9: 0.5}]
    # It does not fit at the end, and goes to the beginning.
    kept.sampled(ints(0), ints(8), *entries, ints(4))
    assert found(kept, (0, 7), (0, 8), (1, 7), (2, 7)) == [{}, full, full, full]
    kept.sampled(ints(0), ints(9), *entries, ints(4))
    assert found(kept, (0, 8), (1, 7), (2, 7), (3, 7)) == [full, {}, full, {8: 0.5, 9: 0.5}]


def test_of_more_than_there_is_room_for_the_newest_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributions_module, "_ENTRIES", 1)
    monkeypatch.setattr(distributions_module, "_STEPS", 1)
    kept = Distributions(ROWS, WIDTH, MOST)  # room for twelve entries
    rows, positions = ints(0, 1, 2, 3, 0), ints(7, 7, 7, 7, 8)
    tokens = np.tile(ints(4, 5, 6), 5)
    probabilities, drafted = np.tile(floats(0.5, 0.25, 0.25), 5), np.tile(ints(4), 5)
    kept.sampled(rows, positions, ints(3, 3, 3, 3, 3), tokens, probabilities, drafted)
    full = {4: 0.5, 5: 0.25, 6: 0.25}
    assert found(kept, (0, 7), (1, 7), (2, 7), (3, 7), (0, 8)) == [{}, full, full, full, full]
