"""The best tokens are those ``torch.topk`` finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.draft.best import best_tokens


@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 9000),
    wanted=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_they_are_the_largest_logits(rows: int, vocabulary: int, wanted: int, seed: int) -> None:
    count = min(wanted, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.stack(
        [torch.randperm(vocabulary, generator=generator).float() for _ in range(rows)]
    )
    values, tokens = best_tokens(logits, count)
    expected = logits.topk(count, dim=-1)
    assert torch.equal(values, expected.values)
    assert torch.equal(tokens, expected.indices)


def test_equal_logits_are_different_tokens() -> None:
    values, tokens = best_tokens(torch.zeros(3, 5000), 8)
    assert values.eq(0).all()
    assert all(len(set(row)) == 8 for row in tokens.tolist())


@pytest.mark.parametrize("at", [0, 31, 32, 155, 156, 4991, 4992, 4999])
def test_the_best_is_found_wherever_it_is(at: int) -> None:
    logits = torch.full((1, 5000), float("-inf"))
    logits[0, at] = 1.0
    values, tokens = best_tokens(logits, 2)
    assert (values[0, 0], tokens[0, 0]) == (1.0, at)


def test_columns_that_are_cut_off_are_never_chosen() -> None:
    """A head padded beyond the vocabulary: its last columns are not the draft's."""
    logits = torch.arange(2.0 * 1000).view(2, 1000)
    assert best_tokens(logits[:, :900], 3)[1].tolist() == [[899, 898, 897]] * 2
