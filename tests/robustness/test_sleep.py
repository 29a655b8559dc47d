"""Sleep mode: the draft's memory is free while the engine sleeps; it comes back with the engine."""

from __future__ import annotations

import time

import pytest
from vllm import LLM

from tests.robustness import harness
from tests.robustness.conftest import LONG_TEXT, LONG_TOKENS, MAX_TOKENS, TEXTS
from tests.robustness.harness import Decoding, draft_pid, stats


@pytest.mark.slow
def test_draft_sleeps_with_the_engine_and_serves_live_requests_again(
    engine: LLM, expected: list[list[int]], expected_long: list[int]
) -> None:
    line = harness.client_of(engine)
    before = stats(engine)
    pid = draft_pid(engine)
    outlives = Decoding(engine, [LONG_TEXT], LONG_TOKENS)
    outlives.steps(5)

    engine.llm_engine.sleep(level=1, mode="keep")
    assert line.link is None
    assert not harness.is_alive(pid)
    time.sleep(1.0)  # longer than the first restart would wait
    line.maintain()
    assert line.link is None

    engine.llm_engine.wake_up(tags=["weights"])
    assert line.link is None  # the KV caches still sleep
    engine.llm_engine.wake_up(tags=["kv_cache"])
    assert line.link is not None
    assert not line.up
    outlives.steps(3)
    assert stats(engine)["misses_draft_down"] > before["misses_draft_down"]

    def step_until_up() -> bool:
        outlives.steps(1)
        time.sleep(0.1)  # the long text must last until the draft is up
        return line.up

    harness.wait_for(step_until_up, harness.RECOVERY_SECONDS, "the draft awake")
    up_again = stats(engine)
    assert outlives.finish() == [expected_long]
    assert outlives.longest_step < harness.STEP_SECONDS
    after = stats(engine)
    assert after["hits"] > up_again["hits"]
    assert after["misses_resync"] > before["misses_resync"]
    assert after["restarts"] == before["restarts"]
    assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected


def test_pausing_alone_keeps_the_draft(engine: LLM, expected: list[list[int]]) -> None:
    pid = draft_pid(engine)
    engine.llm_engine.sleep(level=0)
    engine.llm_engine.wake_up(tags=["scheduling"])
    assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected
    assert draft_pid(engine) == pid


def test_a_sleeping_engine_shuts_down(engine: LLM) -> None:
    engine.llm_engine.sleep(level=2)
    line = harness.client_of(engine)
    engine.llm_engine.engine_core.shutdown()
    assert line.link is None
