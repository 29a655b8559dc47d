"""The command itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_ssd.cli import CommandError, env, models
from vllm_ssd.cli.main import app
from vllm_ssd.cli.models import DemoModels


def test_models_prints_target_then_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "demo_models", lambda: DemoModels(Path("/t"), Path("/d")))
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0
    assert result.stdout == "/t\n/d\n"


def test_error_is_one_line_and_exit_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> DemoModels:
        raise CommandError("no network: try again")

    monkeypatch.setattr(models, "demo_models", fail)
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "vllm-ssd: no network: try again\n"


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules)"
    code = f"import sys, vllm_ssd.cli.main; sys.exit(str({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


PRINT_PRELOAD = "import os; print(os.environ.get('LD_PRELOAD'))"


def run_preloaded(tmp_path: Path, preloaded: str | None) -> str:
    script = tmp_path / "script.py"
    script.write_text(PRINT_PRELOAD)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    if preloaded:
        environment["LD_PRELOAD"] = preloaded
    command = [sys.executable, "-m", "vllm_ssd.cli.env", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_script_runs_with_openmp_preloaded_where_it_is_installed(tmp_path: Path) -> None:
    assert run_preloaded(tmp_path, None) == str(env.openmp_library())


def test_preloaded_openmp_of_the_user_stays(tmp_path: Path) -> None:
    library = env.openmp_library()
    chosen = f"{tmp_path}/libgomp.so.1" if library is None else f"{library}"
    assert run_preloaded(tmp_path, chosen) == chosen


def test_command_starts_itself_again_only_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from vllm_ssd.cli.env import preload_openmp\n"
        "print('started', flush=True)\npreload_openmp()\nprint('went on')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    starts = 1 if env.openmp_library() is None else 2
    assert done.stdout.split("\n")[:-1] == ["started"] * starts + ["went on"]
