"""Steps announced to the draft after their launch, as on a GPU: it still follows every request."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import LLM

from tests.robustness import harness
from tests.robustness.conftest import MAX_TOKENS, TEXTS
from tests.robustness.harness import Decoding, stats


def worker_of(llm: LLM) -> Any:
    """The worker of an engine in this process."""
    core: Any = llm.llm_engine.engine_core
    return core.engine_core.model_executor.driver_worker.worker


@pytest.mark.parametrize("first", [pytest.param(True, marks=pytest.mark.slow), False])
def test_draft_follows_whether_a_step_is_announced_before_the_launch_or_after(
    engine: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    worker = worker_of(engine)
    order: list[str] = []
    for owner, name in ((worker._proposer, "scheduled"), (worker.model_runner, "execute_model")):
        original = getattr(owner, name)

        def note(*of: Any, name: str = name, original: Any = original) -> Any:
            order.append(name)
            return original(*of)

        monkeypatch.setattr(owner, name, note)
    monkeypatch.setattr(worker, "_notifies_first", first)
    before = stats(engine)
    assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected
    after = stats(engine)
    assert order[:2] == (
        ["scheduled", "execute_model"] if first else ["execute_model", "scheduled"]
    )
    assert after["notices"] - before["notices"] == order.count("scheduled")
    assert after["notice_seconds"] > before["notice_seconds"]
    rounds = after["look_ups"] - before["look_ups"]
    assert after["hits"] - before["hits"] > 0.5 * rounds
    # Finished requests are forgotten with the step after.
    Decoding(engine, TEXTS[:1], 3).finish()
    assert len(harness.client_of(engine).published.cache.trees) <= 1
