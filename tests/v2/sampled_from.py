"""What drafts were sampled from, put into the arrays that the device reads, and read from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_ssd.target.v2.device_sources import DeviceSources
from vllm_ssd.wire.messages import MAX_ROWS

DEPTH, MOST, VOCAB_SIZE, SLOTS, WIDTH = 3, 4, 16, 4, 8
CPU = torch.device("cpu")
AHEAD = torch.arange(DEPTH)
ARRAYS = ("_tokens", "_probabilities", "_support", "_sum", "_lives")
"""In the order in which they are read."""
Q = {5: 0.5, 9: 0.25, 2: 0.25}


def sources() -> DeviceSources:
    return DeviceSources(WIDTH, MOST, CPU)


def put(
    into: DeviceSources, drafted: int, q: dict[int, float], row: int = 6, position: int = 20
) -> None:
    """A token was sampled."""
    tokens, probabilities = np.array(list(q), np.int32), np.array(list(q.values()), np.float32)

    def one(number: int) -> Any:
        return np.array([number], np.int32)

    into.sampled(one(row), one(position), one(len(q)), tokens, probabilities, one(drafted))


def read(
    found: DeviceSources,
    drafts: list[int],
    row: int = 6,
    first: int = 20,
    drafted: int = DEPTH,
    life: int | None = None,
) -> list[dict[int, float]]:
    """The distribution of each token that is proposed from there."""
    rows = torch.tensor([row])
    sampled = found.read(
        rows,
        found.lives(rows.clamp(0, MAX_ROWS - 1)) if life is None else torch.tensor([life]),
        torch.tensor([first]),
        torch.tensor([drafts]),
        torch.tensor([drafted]),
        AHEAD,
    )
    each = zip(sampled.tokens[0].tolist(), sampled.logs[0].exp().tolist(), strict=True)
    result = [dict(zip(tokens, q, strict=True)) for tokens, q in each]
    assert int(sampled.count[0]) == sum(len(q) > 1 for q in result)
    return result
