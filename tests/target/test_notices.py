"""The messages to the draft about a step, and when they are sent."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from vllm_ssd.target import notices as notices_module
from vllm_ssd.target.notices import Notices
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.target.requests import RequestTable
from vllm_ssd.target.steps import EngineRequest, Scheduled
from vllm_ssd.wire.messages import Finished, Start, Trimmed
from vllm_ssd.wire.packing import unpack_list

PROMPT = [5, 6, 7, 8]


class Line:
    """As much of the client as notices use."""

    up = True

    def __init__(self) -> None:
        self.published = PublishedTrees(3, 100)


def request(req_id: str) -> EngineRequest:
    return EngineRequest(req_id, PROMPT, len(PROMPT), SamplingParams(max_tokens=20))


def step(new: tuple[str, ...] = (), gone: tuple[str, ...] = (), **verified: int) -> Scheduled:
    """A step; ``verified``: how many tokens running requests verify."""
    return Scheduled(gone, [request(req_id) for req_id in new], verified.items(), None)


def trimmed_to(notices: Notices, a_step: Scheduled) -> list[int]:
    """How many drafts of each request the step verifies, from the message to the draft."""
    (message,) = notices.scheduled(a_step)
    assert isinstance(message, Trimmed)
    return unpack_list(message.verified_counts)


@pytest.fixture
def table() -> RequestTable:
    return RequestTable(64)


@pytest.fixture
def notices(table: RequestTable) -> Notices:
    line: Any = Line()
    return Notices(line, table)


def test_a_new_request_is_announced_and_a_finished_one_dropped(notices: Notices) -> None:
    (start,) = notices.scheduled(step(new=("a",)))
    assert isinstance(start, Start)
    finished, other = notices.scheduled(step(new=("b",), gone=("a",)))
    assert isinstance(finished, Finished)
    assert unpack_list(finished.handles) == [start.handle]
    assert isinstance(other, Start)
    assert notices.scheduled(step(gone=("a",))) == []


def test_the_draft_is_told_how_many_of_its_tokens_are_verified(
    notices: Notices, table: RequestTable
) -> None:
    notices.scheduled(step(new=("a",)))
    known = table.get("a")
    assert known is not None
    known.proposed, known.verifying = [1, 2, 3], 3
    assert notices.scheduled(step(a=3)) == []
    assert trimmed_to(notices, step(a=1)) == [1]
    # Padding does not count as drafts; a preempted request verifies nothing.
    assert trimmed_to(notices, step(a=4)) == [3]
    assert notices.scheduled(step()) == []
    assert trimmed_to(notices, step(a=0)) == [0]


def test_long_texts_take_turns(notices: Notices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices_module, "ANNOUNCED_TOKENS", len(PROMPT))
    assert len(notices.scheduled(step(new=("a", "b")))) == 1
    notices.scheduled(step())
    assert len(notices.announced_again(request("b"))) == 1
    assert notices.announced_again(request("c")) == []


def test_nothing_is_announced_while_the_draft_is_down(
    notices: Notices, table: RequestTable
) -> None:
    notices._client.up = False
    assert notices.scheduled(step(new=("a",))) == []
    assert table.get("a") is None
