"""Which arm a request gets, whatever the size of the batch that it is in."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from vllm_ssd.core.arms import BLOCK, LEVELS, BestArm, arms_of
from vllm_ssd.draft.drafting import Drafting
from vllm_ssd.draft.request import Request

ARMS = arms_of("auto", 1.0)
BETTER = 1
TOKENS = {0: 2.5, BETTER: 2.8}
"""What a verification yields with each arm, on average."""
SECONDS = {1: 0.030, 16: 0.090}
"""What it takes, by the size of the batch."""


def request(handle: int) -> Request:
    """One with a temperature; nothing is drafted for it."""
    unused = cast(Any, None)
    text = np.zeros(4, np.int32)
    made = Request(unused, handle, text, 0, 1000, text, unused, temperature=0.7)
    made.verified = 4
    return made


def test_the_size_of_a_batch_says_nothing_of_an_arm() -> None:
    kept: list[int] = []
    for seed in range(3):
        drafting = Drafting(cast(Any, None), ARMS, 4, {})
        drafting._best = [BestArm(len(ARMS), seed) for _ in range(LEVELS)]
        random = np.random.default_rng(seed)
        for turn in range(60):
            size = 16 if turn // 10 % 2 else 1
            requests = [request(handle) for handle in range(size)]
            for each in requests:
                drafting.begin(each)
            # As many blocks at either size, one after the other or side by side.
            for _ in range(BLOCK * 16 // size):
                arms = [each.block.arm for each in requests if each.block]
                if turn >= 20:
                    kept += arms
                confirmed = [[5] * int(random.choice(_around(TOKENS[arm]))) for arm in arms]
                drafting.observe(requests, confirmed, SECONDS[size], 0.0)
    assert kept.count(BETTER) > 0.9 * len(kept)


def _around(mean: float) -> list[int]:
    """Ten numbers from 1 to 5 with that mean, spread like those of tokens."""
    many = [1, 1, 1, 2, 2, 3, 3, 4, 4, 4]
    missing = round(10 * mean) - sum(many)
    for at in range(missing):
        many[-1 - at] += 1
    return many
