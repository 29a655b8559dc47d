"""The demonstration: its table, and how it shows that SSD's text is plain vLLM's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_ssd.cli import demo
from vllm_ssd.cli.demo import DRAFT_MODEL, PLAIN, SSD, _table
from vllm_ssd.cli.demo_engine import Answers, Questions
from vllm_ssd.cli.main import app
from vllm_ssd.cli.models import DemoModels


def test_everything_is_readable_in_eighty_columns() -> None:
    speculating = {"drafts": 100.0, "accepted_tokens": 75.0, "hits": 59.0, "look_ups": 100.0}
    times = {"draft_rounds": 100.0, "draft_round_seconds": 7.6}
    times |= {"verify_intervals": 100.0, "verify_seconds": 7.8}
    same = [[1] * 128] * 3
    results = {
        PLAIN: Answers(same, seconds=20.0, gaps=19.0),
        DRAFT_MODEL: Answers([[2] * 128] * 3, seconds=28.0, gaps=27.0, metrics=speculating),
        SSD: Answers(same, seconds=24.0, gaps=23.0, metrics=speculating | times),
    }
    results[DRAFT_MODEL].again = replace(results[SSD], seconds=32.0, gaps=31.0)
    console = Console(width=80, record=True)
    console.print(_table(results))
    text = console.export_text()
    assert "…" not in text
    lines = [line.split() for line in text.splitlines()]
    assert [PLAIN, "19.2", "50", "ms", "-", "-", "-", "-"] in lines
    assert [DRAFT_MODEL, "13.7", "71", "ms", "1.75", "59", "%", "-", "differs"] in lines
    last = [SSD, "16.0", "60", "ms", "1.75", "59", "%", "76", "ms", "/", "78", "ms", "identical"]
    assert last in lines
    sampled = f"{DRAFT_MODEL}, 0.7 12.0 81 ms 1.75 59 % 76 ms / 78 ms -".split()
    assert sampled in lines, "text that was sampled is compared with nothing"
    # Where text differs, the table says why.
    assert "In bfloat16 the text may differ" in " ".join(text.split())
    results[DRAFT_MODEL] = results[SSD]
    console.print(_table(results))
    assert "bfloat16" not in console.export_text()


Ask = Callable[[Questions, Any], Answers]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, int]]:
    """What was asked of which method: (method, dtype, number of questions)."""
    monkeypatch.setattr(demo, "demo_models", lambda: DemoModels(Path("target"), Path("draft")))
    monkeypatch.setattr(demo, "console", Console(width=200))
    monkeypatch.setattr("vllm_ssd.cli.env.openmp_library", lambda: None)
    return []


def engines(
    asked: list[tuple[str, str | None, int]], machine: str, *wrong: str, lost: int = 0
) -> Ask:
    """Engines on a machine whose faster type is ``machine``; text is wrong in the types named.

    SSD's has no draft at ``lost`` look-ups.
    """

    def ask(spec: Questions, listen: Any) -> Answers:
        method = (spec.speculative_config or {}).get("method", "plain")
        asked.append((method, spec.dtype, len(spec.prompts)))
        dtype = spec.dtype or machine
        token = 9 if method == "ssd" and dtype in wrong else 5
        answers = [[5] * 7 + [token] for _ in spec.prompts]
        metrics = {"accepted_tokens": 3.0, "misses_draft_down": float(lost)}
        return Answers(answers, dtype, 1.0, 0.9, metrics if method == "ssd" else {})

    return ask


def test_text_is_compared_again_in_float32_and_found_identical(
    asked: list[tuple[str, str | None, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "ask", engines(asked, "bfloat16", "bfloat16"))
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, result.stderr
    said = "In float32, plain vLLM's first answer and SSD's: identical, all 8 tokens, 3 of them"
    assert said in result.stdout
    assert asked[3:] == [("plain", "float32", 1), ("ssd", "float32", 1)]


def test_where_everything_runs_in_float32_nothing_is_asked_twice(
    asked: list[tuple[str, str | None, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "ask", engines(asked, "float32"))
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, result.stderr
    assert "answers and SSD's: identical, all 24 tokens, 3 of them drafted." in result.stdout
    assert len(asked) == 3


@pytest.mark.parametrize("machine", ["bfloat16", "float32"])
def test_text_that_differs_in_float32_is_an_error(
    machine: str, asked: list[tuple[str, str | None, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "ask", engines(asked, machine, "float32"))
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "in float32 SSD's answer to 'Write a short story" in result.stderr
    assert "differs from plain vLLM's after 7 tokens" in result.stderr
    assert "tokens/s" in result.stdout  # the table is shown all the same
    assert "all 8 tokens" not in result.stdout


def test_text_without_a_draft_is_no_proof(
    asked: list[tuple[str, str | None, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "ask", engines(asked, "bfloat16", lost=6))
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "no draft at 6 look-ups" in result.stderr


@pytest.mark.slow
def test_demonstration_runs_and_ends_with_identical_text(demo_pair: DemoModels) -> None:
    command = [sys.executable, "-m", "vllm_ssd.cli.main", "demo", "--max-tokens", "24"]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    drafted = re.search(r"identical, all (?:24|72) tokens, (\d+) of them drafted\.", text)
    assert drafted is not None
    assert int(drafted[1]) > 0
