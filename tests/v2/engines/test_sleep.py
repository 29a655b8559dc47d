"""Sleep mode: the draft ends when the engine sleeps, and follows the live requests again after."""

from __future__ import annotations

import time

import pytest

from tests.robustness import harness
from tests.robustness.harness import Decoding, stats
from tests.tiny_models import TinyModels
from tests.v2.engines.harness import LONG, TEXTS, client_of, running

pytestmark = pytest.mark.slow


def test_the_draft_sleeps_with_the_engine_and_serves_live_requests_again(
    tiny_pair: TinyModels, asynchronous: bool, expected_texts: list[list[int]]
) -> None:
    *expected, expected_long = expected_texts
    with running(tiny_pair, "itself", asynchronous, max_model_len=1024) as engine:
        llm, client = engine.llm, client_of(engine)
        before, pid = stats(llm), client.link.pid
        outlives = Decoding(llm, [LONG.prompt], LONG.tokens)
        outlives.steps(5)

        llm.llm_engine.sleep(level=1, mode="keep")
        assert client.link is None
        assert not harness.is_alive(pid)
        time.sleep(1.0)  # longer than the first restart would wait
        assert client.link is None
        assert stats(llm)["draft_up"] == 0

        llm.llm_engine.wake_up(tags=["weights"])
        assert client.link is None  # the KV caches still sleep
        llm.llm_engine.wake_up(tags=["kv_cache"])
        assert client.link is not None
        outlives.steps(3)
        assert stats(llm)["misses_draft_down"] > before["misses_draft_down"]

        def step_until_up() -> bool:
            outlives.steps(1)
            time.sleep(0.1)  # the long text must last until the draft is up
            return bool(client.up)

        harness.wait_for(step_until_up, harness.RECOVERY_SECONDS, "the draft awake")
        up_again = stats(llm)
        assert outlives.finish() == [expected_long]
        assert outlives.longest_step < harness.STEP_SECONDS
        after = stats(llm)
        assert after["hits"] > up_again["hits"]
        assert after["misses_resync"] > before["misses_resync"]
        assert after["restarts"] == before["restarts"]
        assert after["errors"] == after["texts_lost"] == 0
        found = Decoding(llm, [text.prompt for text in TEXTS], TEXTS[0].tokens).finish()
        assert found == expected

        # A sleeping engine shuts down.
        llm.llm_engine.sleep(level=2)
    assert client.link is None
