"""Where short proposals are filled up, and with what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.config import CUDAGraphMode

from vllm_ssd.target.lookup import Batch
from vllm_ssd.target.v1.padding import pad, pads

K = 4


@pytest.mark.parametrize(
    ("graphs", "wanted"),
    [
        # A batch in which one is short leaves the FULL graphs for PIECEWISE ones, or for none.
        (CUDAGraphMode.FULL_AND_PIECEWISE, True),
        (CUDAGraphMode.FULL_DECODE_ONLY, True),
        # Those serve mixed batches, too.
        (CUDAGraphMode.FULL, False),
        (CUDAGraphMode.PIECEWISE, False),
        (CUDAGraphMode.NONE, False),
        (None, False),
    ],
)
def test_misses_are_padded_where_full_graphs_are_for_decoding_alone(
    graphs: CUDAGraphMode | None, wanted: bool
) -> None:
    assert pads("auto", graphs) is wanted
    assert pads(True, graphs) is True
    assert pads(False, graphs) is False


def padded(proposal: list[int], sampled: list[int], length: int, **limits: Any) -> list[int]:
    """One request's proposal, filled up; its prompt has 4 tokens."""
    parameters = SimpleNamespace(**{"max_tokens": None, "min_tokens": 0, **limits})
    state = SimpleNamespace(num_prompt_tokens=4, sampling_params=parameters)
    batch = Batch(["a"], [sampled], [length], np.zeros((1, 64), np.int32))
    proposals = [proposal]
    pad(proposals, batch, {"a": state}, K)
    return proposals[0]


def test_a_proposal_is_filled_up_with_its_last_token() -> None:
    assert padded([7, 8], [5], 10) == [7, 8, 8, 8]
    assert padded([], [6, 5], 10) == [5, 5, 5, 5]
    assert padded([1, 2, 3, 4], [5], 10) == [1, 2, 3, 4]


def test_nothing_is_proposed_where_nothing_was_sampled() -> None:
    assert padded([], [], 10) == []


def test_the_record_of_what_was_drafted_stays_as_it_is() -> None:
    drafted = [7]
    assert padded(drafted, [5], 10) == [7, 7, 7, 7]
    assert drafted == [7]


def test_padding_ends_before_the_end_of_a_text() -> None:
    assert padded([7], [5], 10, max_tokens=9) == [7, 7]
    assert padded([7], [5], 13, max_tokens=10) == [7]
    # No verification crosses the length from which a request may end.
    assert padded([7], [5], 10, min_tokens=9) == [7, 7]
