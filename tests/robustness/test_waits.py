"""The draft stops, dies or is misunderstood while the target waits for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from vllm import LLM

from tests.robustness import harness
from tests.robustness.conftest import MAX_TOKENS, TEXTS
from tests.robustness.faulty_channel import FAULTS, FaultyChannel
from tests.robustness.harness import Decoding, draft_pid, stats
from tests.tiny_models import TinyModels

BOUND_SECONDS = 3.0


@pytest.fixture(scope="module", params=["draft", pytest.param("auto", marks=pytest.mark.slow)])
def waiting_engine(
    request: pytest.FixtureRequest, tiny_pair: TinyModels, plain_answers: list[list[int]]
) -> Iterator[LLM]:
    """An engine that waits after every miss, or while it pays; its draft often misses."""
    options = harness.ssd_options(
        tiny_pair.near, backup=request.param, max_wait_ms=1e3 * BOUND_SECONDS, fan_out=1
    )
    with harness.running_engine(tiny_pair, options) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _it_waits(waiting_engine: LLM, expected: list[list[int]]) -> None:
    """The draft is up, and the target waits for it."""

    def waits() -> bool:
        before = stats(waiting_engine)["waited_tokens"]
        assert Decoding(waiting_engine, TEXTS, MAX_TOKENS).finish() == expected
        return stats(waiting_engine)["waited_tokens"] > before

    harness.wait_for(waits, harness.RECOVERY_SECONDS, "waits for the draft")


def test_a_stopped_draft_costs_one_wait_until_it_answers(
    waiting_engine: LLM, expected: list[list[int]]
) -> None:
    pid = draft_pid(waiting_engine)
    decoding = Decoding(waiting_engine, TEXTS, MAX_TOKENS)
    decoding.steps(3)
    os.kill(pid, signal.SIGSTOP)
    try:
        before = stats(waiting_engine)
        decoding.steps(12)
        after = stats(waiting_engine)
    finally:
        with suppress(ProcessLookupError):  # on a busy machine it may have been replaced by now
            os.kill(pid, signal.SIGCONT)
    # What it had sent before may still end one wait.
    assert after["waits"] - before["waits"] <= 2
    assert after["waits_in_vain"] - before["waits_in_vain"] <= 1
    assert decoding.finish() == expected


def test_a_draft_that_dies_during_a_wait_ends_the_wait(
    waiting_engine: LLM, expected: list[list[int]]
) -> None:
    pid = draft_pid(waiting_engine)
    decoding = Decoding(waiting_engine, TEXTS, MAX_TOKENS)
    decoding.steps(3)
    before = stats(waiting_engine)
    counters = harness.client_of(waiting_engine)._stats
    finished = threading.Event()

    def waits() -> bool:
        return counters.wait_seconds < 0.0  # its beginning is counted already, its end is not

    def kill_in_a_wait() -> None:
        while not finished.wait(0.02):
            # What it had sent before it was stopped ends a wait at once.
            if waits() and not finished.wait(0.2) and waits():
                break
        os.kill(pid, signal.SIGKILL)

    os.kill(pid, signal.SIGSTOP)
    killer = threading.Thread(target=kill_in_a_wait)
    killer.start()
    try:
        assert decoding.finish() == expected
    finally:
        in_a_wait = not finished.is_set() and not killer.is_alive()
        finished.set()
        killer.join()
    after = stats(waiting_engine)
    if in_a_wait:
        # A wait that goes on to its bound ends with what was found before.
        assert after["misses_resync"] > before["misses_resync"]
    assert after["errors"] == 0


@pytest.mark.slow
def test_faulty_frames_cost_no_text_where_the_target_waits(
    waiting_engine: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, fault in enumerate(FAULTS):
        for direction in ("to draft", "to target"):
            process: Any = harness.client_of(waiting_engine).link
            if process is None:
                continue  # garbage may have ended it; the next one takes a while
            channel = FaultyChannel(process.channel, direction, fault, 0.1, seed)
            with monkeypatch.context() as faulty:
                faulty.setattr(process, "channel", channel)
                decoding = Decoding(waiting_engine, TEXTS, MAX_TOKENS)
                assert decoding.finish() == expected
            assert decoding.longest_step < harness.STEP_SECONDS
    assert stats(waiting_engine)["errors"] == 0
