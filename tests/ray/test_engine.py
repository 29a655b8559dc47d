"""Engines whose draft Ray places: they answer as plain vLLM does, whatever happens to the draft."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.ray.conftest import (
    ROOT,
    Nodes,
    draft_actors,
    node_of,
    pids_of,
    raylet,
    the_actor,
    wait_until_gone,
)
from tests.robustness import harness
from tests.tiny_models import TinyModels
from vllm_ssd.on_ray.finding import LINGER_SECONDS

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


@pytest.mark.slow
def test_draft_on_another_node_killed_and_gone_with_the_engine(
    tiny_pair: TinyModels, expected: list[list[int]], nodes: Nodes
) -> None:
    options = ray_options(tiny_pair, draft_resources={"draft": 0.5})
    with harness.running_engine(tiny_pair, options) as llm:
        actor, server = pids_of(the_actor())
        assert node_of(actor) == raylet(nodes.second)
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
    third = nodes.add()
    of_third = raylet(third)
    options = ray_options(tiny_pair, draft_resources={"node": third.node_id})
    with harness.running_engine(tiny_pair, options) as llm:
        actor, server = pids_of(the_actor())
        assert node_of(actor) == of_third
        check_loss(llm, expected, lambda: nodes.kill(third))
        wait_until_gone(actor, server)
        new_actor, _ = pids_of(the_actor())
        assert node_of(new_actor) != of_third
    harness.wait_for(lambda: not draft_actors(), 20.0, "no actor left")


ENGINE = """
import json, sys
from tests.robustness import harness
from tests.tiny_models import tiny_models

options, texts, max_tokens = json.loads(sys.argv[1])

if __name__ == "__main__":
    import vllm_ssd
    with harness.running_engine(tiny_models(), options) as llm:
        prompts = [{"prompt_token_ids": text} for text in texts]
        answers = llm.generate(prompts, harness.greedy(max_tokens), use_tqdm=False)
        tokens = [list(answer.outputs[0].token_ids) for answer in answers]
        print("ANSWER", json.dumps([tokens, vllm_ssd.get_stats(llm)]), flush=True)
        sys.stdin.readline()
"""
"""An engine whose worker is a process of vLLM's, which stays until it is told to end."""


def start_engine(folder: Path, options: dict[str, Any], nodes: Nodes) -> subprocess.Popen[str]:
    """The engine above, speculating in every round; it answers all texts."""
    script = folder / "engine.py"
    script.write_text(ENGINE)
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "RAY_ADDRESS": nodes.address,
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, str(script), json.dumps([options, TEXTS, MAX_TOKENS])],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def answers_of(engine: subprocess.Popen[str]) -> tuple[list[list[int]], dict[str, float]]:
    """Its answers and counters, once it has them."""
    assert engine.stdout is not None
    for line in engine.stdout:
        if line.startswith("ANSWER"):
            tokens, stats = json.loads(line.removeprefix("ANSWER"))
            return tokens, stats
    raise AssertionError("the engine has ended")


@pytest.mark.slow
def test_two_engines_of_worker_processes_share_one_draft(
    tiny_pair: TinyModels, expected: list[list[int]], nodes: Nodes, tmp_path: Path
) -> None:
    options = ray_options(tiny_pair, draft_name="ours", draft_resources={"draft": 1.0})
    engines = [start_engine(tmp_path, options, nodes) for _ in range(2)]
    try:
        for engine in engines:
            tokens, stats = answers_of(engine)
            assert tokens == expected
            assert stats["hits"] > 0
            assert stats["errors"] == stats["resyncs"] == stats["restarts"] == 0
        assert list(draft_actors()) == ["vllm_ssd_draft_ours"]
        pids = pids_of(the_actor())
        os.killpg(engines[0].pid, signal.SIGKILL)  # vLLM leaves the other processes be
        engines[1].communicate("end\n", timeout=60.0)
        assert engines[1].returncode == 0
    finally:
        for engine in engines:
            with suppress(ProcessLookupError):
                os.killpg(engine.pid, signal.SIGKILL)
            engine.wait()
    wait_until_gone(*pids, seconds=LINGER_SECONDS + 20.0)
    harness.wait_for(lambda: not draft_actors(), 20.0, "no actor left")
