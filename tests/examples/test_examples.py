"""The examples run as their documents say, with the models of the demonstration."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.robustness import harness
from tests.robustness.serving import Server
from vllm_ssd.cli.engine_process import best_dtype
from vllm_ssd.cli.models import DemoModels

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
START_SECONDS = 600.0
"""Two models are compiled."""


def run(arguments: list[str], text: str = "") -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_offline(demo_pair: DemoModels) -> None:
    script = str(EXAMPLES / "offline.py")
    said = run(["-m", "vllm_ssd.cli.env", script, "--max-tokens", "48", "Name three fruits."])
    assert "> Name three fruits." in said
    found = re.search(r"hit rate (\d+)%, acceptance length ([\d.]+)", said)
    assert found is not None
    assert int(found[1]) > 20
    assert float(found[2]) > 1.2


@pytest.fixture(scope="module")
def server(demo_pair: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As in examples/serve/README.md."""
    options = {"method": "ssd", "model": str(demo_pair.draft), "num_speculative_tokens": 4}
    running = Server(
        demo_pair.target,
        tmp_path_factory.mktemp("server"),
        dtype=best_dtype(),
        max_model_len=2048,
        max_num_seqs=8,
        speculative_config=json.dumps(options),
        served_model_name="smollm2",
        kv_cache_memory_bytes=1 << 30,
    )
    try:
        harness.wait_for(running.is_healthy, START_SECONDS, "a healthy server")
        yield running
    finally:
        running.end()


def test_chat(server: Server) -> None:
    arguments = [str(EXAMPLES / "chat.py"), "--url", server.url, "--max-tokens", "64"]
    said = run(arguments, "Write a short story about a lighthouse.\nWhy?\n\n")
    first, second = re.findall(
        r"(\d+) tokens, \d+ a second; (\d+) of (\d+) look-ups hit; (\d+) drafted", said
    )
    assert int(first[0]) == 64
    for tokens, hits, look_ups, accepted in (first, second):
        assert 0 < int(hits) <= int(look_ups) <= int(tokens)
        assert 0 < int(accepted) < int(tokens)
