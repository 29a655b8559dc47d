"""Which cores the target and the draft get, and that the process gets its own back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from vllm_ssd import affinity
from vllm_ssd.target.cores import bind_target, split_cores

ALLOWED = sorted(os.sched_getaffinity(0))

needs_two_cores = pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two cores")


@pytest.fixture(autouse=True)
def _same_cores_afterwards() -> Iterator[None]:
    yield
    assert sorted(os.sched_getaffinity(0)) == ALLOWED


@needs_two_cores
def test_target_and_draft_share_no_core() -> None:
    split = split_cores(None, in_process=True)
    assert split.target is not None
    assert not set(split.target) & set(split.draft)


@needs_two_cores
def test_second_engine_of_a_process_gets_the_same_cores_while_the_first_is_bound() -> None:
    first = split_cores(None, in_process=True)
    affinity.bind(ALLOWED[:1])
    try:
        assert split_cores(None, in_process=True) == first
        assert split_cores(ALLOWED[-1:], in_process=True).draft == ALLOWED[-1:]
        affinity.bind(ALLOWED[:1])
        affinity.unbind()
        assert sorted(os.sched_getaffinity(0)) == ALLOWED[:1]
    finally:
        affinity.unbind()


def test_process_gets_its_cores_back() -> None:
    affinity.bind(ALLOWED[:1])
    assert sorted(os.sched_getaffinity(0)) == ALLOWED[:1]
    affinity.unbind()
    assert sorted(os.sched_getaffinity(0)) == ALLOWED
    assert affinity.available_cores() == ALLOWED


def test_threads_of_an_earlier_engine_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    # As vLLM leaves it behind.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not bind_target(ALLOWED[:1])
    assert sorted(os.sched_getaffinity(0)) == ALLOWED


def test_core_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"draft_cpu_cores.*core 999 is not available"):
        split_cores([999], in_process=True)
