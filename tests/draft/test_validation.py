"""What the draft refuses of a request before anything is computed."""

from __future__ import annotations

import math

import pytest

from vllm_ssd.draft.validation import Bounds, check
from vllm_ssd.wire.messages import Start, Verified
from vllm_ssd.wire.packing import pack

BOUNDS = Bounds(vocab_size=100, max_model_len=64, num_speculative_tokens=4)


def start(temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Start:
    return Start(1, pack([3, 4]), 60, [2], temperature, top_k, top_p)


@pytest.mark.parametrize("fine", [start(), start(1e-5), start(2.0, 50, 0.3), start(0.7, 10**9)])
def test_any_sampling_that_vllm_allows_is_taken(fine: Start) -> None:
    check(fine, BOUNDS)


@pytest.mark.parametrize(
    "garbage",
    [
        start(-0.1),
        start(math.nan),
        start(math.inf),
        start(1.0, -1),
        start(1.0, 2**31),
        start(1.0, 0, 0.0),
        start(1.0, 0, 1.1),
        start(1.0, 0, math.nan),
    ],
)
def test_a_sampling_that_makes_no_sense_is_refused(garbage: Start) -> None:
    with pytest.raises(ValueError, match="temperature"):
        check(garbage, BOUNDS)


def test_a_verification_confirms_a_token_at_least() -> None:
    one, none = pack([1]), pack([0])
    check(Verified(one, pack([2]), one, none, pack([5]), 0), BOUNDS)
    with pytest.raises(ValueError, match="a count that is not from 1"):
        check(Verified(one, pack([2]), none, none, b"", 0), BOUNDS)
