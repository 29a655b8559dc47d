"""``vllm-ssd doctor``: what it finds on this machine, with real models, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import TinyModels, random_llama
from vllm_ssd.cli import doctor
from vllm_ssd.cli.findings import Finding, Status

MACHINE = {"vLLM", "versions", "plugin", "hooks", "model runner", "platform", "cores", "OpenMP"}
PAIR = {"target", "draft", "attention", "vocabulary", "head", "memory of the draft"}


def examine(*models: str | Path) -> dict[str, Finding]:
    """The findings, by check."""
    target, draft = map(str, models) if models else (None, None)
    found = list(doctor._examine(doctor.Asked(target, draft)))
    assert len({finding.check for finding in found}) == len(found)
    return {finding.check: finding for finding in found}


def errors(found: dict[str, Finding]) -> dict[str, Finding]:
    return {check: one for check, one in found.items() if one.status == Status.ERROR}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vllm_ssd.cli.main", "doctor", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "400"},
    )


def test_json_has_all_checks_and_nothing_else_is_printed(tiny_pair: TinyModels) -> None:
    done = command(str(tiny_pair.target), str(tiny_pair.draft), "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert {each["check"] for each in found} >= MACHINE | PAIR
    assert not [each for each in found if each["status"] == "error"]


@pytest.mark.slow
def test_an_error_is_shown_with_its_mend_and_exit_status_1(tmp_path: Path) -> None:
    done = command(str(tmp_path), str(tmp_path / "none"))
    assert done.returncode == 1
    shown = " ".join(done.stdout.replace("│", " ").split())
    assert "error" in shown
    assert "a model that this vLLM supports" in shown


def test_one_model_alone_is_a_mistake_in_the_command_line() -> None:
    done = command("target-alone")
    assert done.returncode == 2
    assert "name both models" in done.stderr


def test_the_machine_is_fit_for_ssd() -> None:
    found = examine()
    assert not errors(found)
    assert found["cores"].found.count("draft") == 1


def test_a_draft_that_is_not_there(tiny_pair: TinyModels) -> None:
    found = errors(examine(tiny_pair.target, "/nowhere"))
    assert list(found) == ["draft"]
    assert "'/nowhere'" in found["draft"].found
    assert "hub name" in found["draft"].mend


def test_a_draft_with_another_vocabulary(tiny_pair: TinyModels, tmp_path: Path) -> None:
    random_llama(layers=1, seed=5, vocab_size=77).save_pretrained(tmp_path)
    found = errors(examine(tiny_pair.target, tmp_path))
    assert list(found) == ["vocabulary"]
    assert "choose a draft with the target's tokenizer" in found["vocabulary"].mend


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("VLLM_PLUGINS", "another", "plugin"),
        ("VLLM_USE_V2_MODEL_RUNNER", "1", "model runner"),
    ],
)
def test_a_setting_that_keeps_ssd_from_working(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, check: str
) -> None:
    monkeypatch.setenv(name, value)
    found = errors(examine())
    assert list(found) == [check]
    assert name in found[check].found
    assert found[check].mend


def test_every_name_that_vllm_has_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker import utils
    from vllm.v1.worker.gpu_worker import Worker

    monkeypatch.delattr(utils, "copy_kv_cache_blocks_inplace")
    monkeypatch.delattr(Worker, "sleep")
    hooks = examine()["hooks"]
    assert hooks.status == Status.ERROR
    assert "gpu_worker.Worker.sleep" in hooks.found
    assert "utils.copy_kv_cache_blocks_inplace" in hooks.found


def test_a_single_core_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ssd import affinity

    monkeypatch.setattr(affinity, "available_cores", lambda: [3])
    found = examine()["cores"]
    assert found.status == Status.WARNING
    assert "another core" in found.mend
