"""Engines whose draft Ray places: they answer as plain vLLM does, whatever happens to the draft."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.ray.conftest import Nodes, draft_actors, node_of, pids_of, the_actor, wait_until_gone
from tests.robustness import harness
from tests.tiny_models import TinyModels

TEXTS = harness.prompts(4)
MAX_TOKENS = 48


def ray_options(models: TinyModels, **options: Any) -> dict[str, Any]:
    """A speculative config whose draft is placed by Ray."""
    return harness.ssd_options(models.near, draft_placement="ray", **options)


@pytest.fixture(scope="module")
def expected(tiny_pair: TinyModels) -> list[list[int]]:
    """What vLLM answers without speculation."""
    with harness.running_engine(tiny_pair) as llm:
        return harness.Decoding(llm, TEXTS, MAX_TOKENS).finish()


def check_loss(llm: Any, expected: list[list[int]], lose: Callable[[], None]) -> None:
    """Lose the draft while requests are decoded: no token changes, and a new draft comes."""
    decoding = harness.Decoding(llm, TEXTS, MAX_TOKENS)
    decoding.steps(8)
    lose()
    assert decoding.finish() == expected
    assert decoding.longest_step < harness.STEP_SECONDS
    harness.decode_until_hits_come_back(llm, TEXTS, expected)


def test_draft_on_another_node_killed_and_gone_with_the_engine(
    tiny_pair: TinyModels, expected: list[list[int]], nodes: Nodes
) -> None:
    options = ray_options(tiny_pair, draft_resources={"draft": 0.5})
    with harness.running_engine(tiny_pair, options) as llm:
        actor, server = pids_of(the_actor())
        assert node_of(actor) != node_of(os.getpid())
        assert harness.Decoding(llm, TEXTS, MAX_TOKENS).finish() == expected
        stats = harness.stats(llm)
        assert stats["hits"] > 10
        assert stats["errors"] == stats["resyncs"] == stats["restarts"] == 0

        check_loss(llm, expected, lambda: os.kill(actor, signal.SIGKILL))
        wait_until_gone(actor, server)
        new_actor, new_server = pids_of(the_actor())
        assert {new_actor, new_server}.isdisjoint({actor, server})
    wait_until_gone(new_actor, new_server)
    harness.wait_for(lambda: not draft_actors(), 20.0, "no actor left")


@pytest.mark.slow
def test_draft_of_a_node_that_dies_comes_up_on_another(
    tiny_pair: TinyModels, expected: list[list[int]], nodes: Nodes
) -> None:
    options = ray_options(tiny_pair, draft_resources={"node": nodes.second.node_id})
    with harness.running_engine(tiny_pair, options) as llm:
        actor, server = pids_of(the_actor())
        check_loss(llm, expected, nodes.kill_second)
        wait_until_gone(actor, server)
        new_actor, _ = pids_of(the_actor())
        assert node_of(new_actor) != node_of(actor)
    harness.wait_for(lambda: not draft_actors(), 20.0, "no actor left")
