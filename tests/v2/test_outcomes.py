"""What a step came to arrives at the follower as it was, and the draft is told of it."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.core.tree import Where
from vllm_ssd.target.v2.device_trees import DeviceTrees
from vllm_ssd.target.v2.look_up import WHERE, Found
from vllm_ssd.target.v2.outcomes import (
    OutcomeReadback,
    Row,
    _UnderWay,
    pack_outcome,
    unpack_outcome,
)

FOUND, OFF, UNKNOWN = (WHERE.index(where) for where in (Where.FOUND, Where.OFF, Where.UNKNOWN))


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed() -> torch.Tensor:
    """Requests in slots 2, 0 and 1: a hit, one whose prompt is being computed, a miss."""
    texts = torch.zeros(3, 8, dtype=torch.int32)
    texts[2, :5] = integers(1, 2, 3, 4, 5)
    texts[1, :8] = integers(9, 8, 7, 6, 5, 4, 3, 2)
    found = Found(
        torch.tensor([[6, 5], [0, 0], [2, 2]]),
        drafted=integers(1, 0, 0),
        ended=integers(1, 0, 0),
        where=integers(FOUND, UNKNOWN, OFF),
        row=integers(3, 0, 0),
        life=integers(2, 0, 0),
    )
    return pack_outcome(
        DeviceTrees(3, 2, 16, torch.device("cpu")),
        found,
        integers(0, 0, 1),
        integers(1, 0, 0),
        texts,
        integers(3, 8, 5),
        torch.tensor([2, 0, 1]),
        integers(2, 0, 1),
        integers(1, 0, 0),
    )


def test_an_outcome_arrives_as_it_was() -> None:
    assert packed().shape == (3, 8 + 3 + 2)
    assert unpack_outcome([11, 12, 13], packed().numpy()) == [
        Row(11, [4, 5], 5, 2, [6], [], sampled_drafts=1, filled=1, ended=True, where=Where.FOUND),
        Row(12, [], 3, 0, [], [], sampled_drafts=0, filled=2, ended=False, where=Where.UNKNOWN),
        Row(13, [2], 8, 0, [], [2], sampled_drafts=0, filled=1, ended=False, where=Where.OFF),
    ]


def fail(error: Exception) -> None:
    raise error


def test_on_a_cpu_it_is_delivered_at_once() -> None:
    delivered: list[tuple[list[int], Int32Array]] = []
    readback = OutcomeReadback(
        torch.device("cpu"), lambda *outcome: delivered.append(outcome), fail
    )
    readback.start([11, 12, 13], packed())
    ((serials, table),) = delivered
    assert unpack_outcome(serials, table)[0].sampled == [4, 5]
    readback.close()


def test_an_outcome_that_cannot_be_delivered_is_reported_and_the_next_one_comes() -> None:
    delivered: list[list[int]] = []
    failed: list[Exception] = []

    def deliver(serials: list[int], table: Int32Array) -> None:
        if serials == [2]:
            raise OSError(9, "Bad file descriptor")
        delivered.append(serials)

    readback = OutcomeReadback(torch.device("cpu"), deliver, failed.append)
    arrived: Any = SimpleNamespace(synchronize=lambda: None)
    for serial in (1, 2, 3):
        readback._under_way.put(_UnderWay([serial], packed(), packed(), arrived))
        readback._under_way.put(partial(delivered.append, [-serial]))
    readback._under_way.put(None)
    readback._deliver_each()  # in a thread, where there is a GPU
    assert delivered == [[1], [-1], [-2], [3], [-3]]
    assert [type(error) for error in failed] == [OSError]
