"""Who is in which slot: a serial stands for one stay of one request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_ssd.target.v2.slots import NOBODY, Begun, Slots


@pytest.fixture
def told() -> list[tuple[list[int], list[Begun]]]:
    return []


@pytest.fixture
def slots(told: list[Any]) -> Slots:
    return Slots(4, lambda gone, begun: told.append((gone, begun)))


def new(*req_ids: str) -> list[Any]:
    return [SimpleNamespace(req_id=req_id) for req_id in req_ids]


def serials(slots: Slots, *which: int) -> list[int]:
    return slots.serials(np.array(which))


def test_new_requests_are_told_with_their_slots(slots: Slots, told: list[Any]) -> None:
    slots.fill(new("a", "b"), {"a": 3, "b": 1})
    ((gone, begun),) = told
    assert gone == []
    assert [(each.serial, each.slot, each.request.req_id) for each in begun] == [
        (0, 3, "a"),
        (1, 1, "b"),
    ]
    assert serials(slots, 1, 3, 0) == [1, 0, NOBODY]


def test_who_takes_a_slot_has_another_serial(slots: Slots, told: list[Any]) -> None:
    slots.fill(new("a"), {"a": 2})
    assert slots.serial("a") == 0
    slots.free(["a", "never seen"])
    assert serials(slots, 2) == [NOBODY]
    assert slots.serial("a") == NOBODY
    slots.fill(new("b"), {"b": 2})
    assert told[-1][0] == [0]
    assert serials(slots, 2) == [1]


def test_a_preempted_request_that_comes_back_begins_again(slots: Slots, told: list[Any]) -> None:
    slots.fill(new("a"), {"a": 2})
    slots.free(["a"])
    slots.fill(new("a"), {"a": 0})
    gone, (begun,) = told[-1]
    assert (gone, begun.serial, begun.slot) == ([0], 1, 0)


def test_a_request_whose_input_is_streamed_begins_again(slots: Slots, told: list[Any]) -> None:
    slots.fill(new("a"), {"a": 2})
    slots.fill(new("a"), {"a": 1})
    assert told[-1][0] == [0]
    assert serials(slots, 1, 2) == [1, NOBODY]


def test_steps_in_which_nobody_comes_or_goes_are_not_told(slots: Slots, told: list[Any]) -> None:
    slots.fill([], {})
    slots.free(["never seen"])
    slots.fill([], {})
    assert told == []
