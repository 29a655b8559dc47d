"""The draft dies or stops answering: the engine decodes on, plainly, until there is another one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from vllm import LLM

from tests.robustness import harness
from tests.robustness.conftest import LONG_TEXT, LONG_TOKENS, MAX_TOKENS, TEXTS
from tests.robustness.harness import Decoding, draft_pid, stats, wait_for
from vllm_ssd.target import client, failures


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft is presumed hung after one second."""
    monkeypatch.setattr(client, "SILENCE_SECONDS", 1.0)


def test_killed_draft_costs_hits_but_no_text_and_comes_back(
    engine: LLM, expected: list[list[int]], expected_long: list[int]
) -> None:
    line = harness.client_of(engine)
    before = stats(engine)
    killed = draft_pid(engine)
    outlives = Decoding(engine, [LONG_TEXT], LONG_TOKENS)
    decoding = Decoding(engine, TEXTS, MAX_TOKENS)
    decoding.steps(5)
    os.kill(killed, signal.SIGKILL)

    assert decoding.finish() == expected
    assert decoding.longest_step < harness.STEP_SECONDS
    assert stats(engine)["misses_draft_down"] > before["misses_draft_down"]

    def step_until_up() -> bool:
        outlives.steps(1)
        time.sleep(0.1)  # the long text must last until the next draft is up
        return line.up

    wait_for(step_until_up, harness.RECOVERY_SECONDS, "a new draft")
    up_again = stats(engine)
    assert outlives.finish() == [expected_long]
    after = stats(engine)
    assert after["restarts"] == before["restarts"] + 1
    assert after["misses_resync"] > before["misses_resync"]
    assert after["misses_draft_down"] == up_again["misses_draft_down"]
    assert after["hits"] - up_again["hits"] > 0.5 * (after["look_ups"] - up_again["look_ups"])
    assert draft_pid(engine) != killed
    assert not harness.is_alive(killed)


@pytest.mark.usefixtures("impatient")
def test_stopped_draft_is_replaced_while_decoding_goes_on(
    engine: LLM, expected: list[list[int]]
) -> None:
    before = stats(engine)
    stopped = draft_pid(engine)
    decoding = Decoding(engine, TEXTS, MAX_TOKENS)
    decoding.steps(5)
    os.kill(stopped, signal.SIGSTOP)

    decoding.steps(3)
    assert stats(engine)["misses_not_ready"] > before["misses_not_ready"]
    assert decoding.finish() == expected
    assert decoding.longest_step < harness.STEP_SECONDS
    harness.decode_until_hits_come_back(engine, TEXTS, expected)
    assert stats(engine)["restarts"] == before["restarts"] + 1
    assert not harness.is_alive(stopped)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_draft_lost_while_the_engine_idles_is_noticed_by_the_next_request(
    engine: LLM, expected: list[list[int]]
) -> None:
    before = stats(engine)
    os.kill(draft_pid(engine), signal.SIGSTOP)
    time.sleep(1.5)

    decoding = Decoding(engine, TEXTS, MAX_TOKENS)
    assert decoding.finish() == expected
    assert decoding.longest_step < harness.STEP_SECONDS
    harness.decode_until_hits_come_back(engine, TEXTS, expected)
    assert stats(engine)["restarts"] == before["restarts"] + 1


@pytest.mark.usefixtures("impatient")
def test_pause_between_two_steps_does_not_cost_the_draft(
    engine: LLM, expected: list[list[int]]
) -> None:
    pid = draft_pid(engine)
    decoding = Decoding(engine, TEXTS, MAX_TOKENS)
    decoding.steps(5)
    time.sleep(1.5)
    assert decoding.finish() == expected
    time.sleep(1.5)
    assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected
    assert draft_pid(engine) == pid


@pytest.mark.slow
def test_draft_that_keeps_dying_is_restarted_with_back_off_until_one_stays(
    engine: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = harness.client_of(engine)
    monkeypatch.setattr(failures, "FIRST_BACKOFF_SECONDS", 0.2)
    monkeypatch.setattr(line, "_failures", 0)
    pauses: list[float] = []
    for _ in range(4):
        began = time.monotonic()
        _kill_and_await_next(engine)
        pauses.append(time.monotonic() - began)
    assert all(pause >= 0.2 * 2**i for i, pause in enumerate(pauses)), pauses

    # Attempts also go on while no process can be started at all.
    monkeypatch.setattr(line, "_failures", 0)
    attempts = stats(engine)["restarts"]
    with monkeypatch.context() as broken:
        broken.setattr("sys.executable", "/nonexistent/python")
        os.kill(draft_pid(engine), signal.SIGKILL)
        tried_twice = _stepped(engine, lambda: stats(engine)["restarts"] >= attempts + 2)
        wait_for(tried_twice, 30.0, "a second attempt")
        assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected

    # The thread that happens to start the next one may end; the draft must not.
    thread = threading.Thread(
        target=wait_for,
        args=(_stepped(engine, lambda: line.link is not None), 30.0, "the last start"),
    )
    thread.start()
    thread.join()
    last = draft_pid(engine)
    harness.decode_until_hits_come_back(engine, TEXTS, expected)
    assert draft_pid(engine) == last


def _kill_and_await_next(engine: LLM) -> None:
    line = harness.client_of(engine)
    killed = draft_pid(engine)
    os.kill(killed, signal.SIGKILL)
    wait_for(
        _stepped(engine, lambda: line.link is not None and line.link.pid != killed),
        30.0,
        "the next start",
    )


def _stepped(engine: LLM, condition: Callable[[], bool]) -> Callable[[], bool]:
    """The condition, looked at after one short request: only a working engine notices losses."""

    def look() -> bool:
        Decoding(engine, TEXTS[:1], 2).finish()
        return condition()

    return look
