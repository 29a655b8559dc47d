"""``vllm-ssd doctor``: what this machine, this vLLM and a pair of models are for SSD.

Each check gives findings: what was found, and the mend if it is wrong. Nothing is loaded but
configurations and tokenizers.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_ssd.cli.doctor_pair import examine_pair
from vllm_ssd.cli.doctor_server import examine_server
from vllm_ssd.cli.findings import Finding, Status, checked

_PLUGIN = "ssd"
"""The name of our entry point."""
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


class Asked(NamedTuple):
    """What to look at beside the machine; None for nothing."""

    target: str | None = None
    """Folder or hub name of the target."""
    draft: str | None = None
    """Of the draft, to be a pair with it."""
    address: str | None = None
    """Of a draft server."""
    key_file: str | None = None
    """Of that server."""


def run(asked: Asked, as_json: bool) -> bool:
    """Check everything and print what was found.

    Args:
        asked: what to look at.
        as_json: print JSON in place of a table.

    Returns:
        Whether SSD can start.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs there
        findings = list(_all_findings(asked))
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        _print(findings)
    return all(finding.status != Status.ERROR for finding in findings)


def _print(findings: list[Finding]) -> None:
    table = Table(show_lines=True)
    for column in ("", "", "found", "mend"):
        table.add_column(column, overflow="fold")
    for check, status, found, mend in findings:
        table.add_row(check, f"[{_STYLES[status]}]{status}[/]", escape(found), escape(mend))
    Console().print(table)


def _all_findings(asked: Asked) -> Iterator[Finding]:
    """The findings; what a check did not expect ends them, as the last one."""
    try:
        yield from _examine(asked)
    except Exception as error:  # of vLLM, transformers, the hub: what was found so far still counts
        said = f"{type(error).__name__}: {error}"
        yield Finding("doctor", Status.ERROR, said, "report this, with the findings above")


def _examine(asked: Asked) -> Iterator[Finding]:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        yield Finding(
            "vLLM",
            Status.ERROR,
            f"it cannot be imported: {error}",
            "install vllm-ssd with its extra `cpu` or `cuda`",
        )
        return
    yield from _versions()
    yield _plugin()
    yield _hooks()
    yield from _settings()
    yield from _machine()
    if asked.target is not None and asked.draft is not None:
        yield from examine_pair(asked.target, asked.draft)
    if asked.address is not None:
        yield from examine_server(asked.address, asked.key_file, asked.target)


# ---- what is installed


def _versions() -> Iterator[Finding]:
    from vllm_ssd.compat import check_vllm_version, vllm_version

    build, version = vllm_version()
    yield checked("vLLM", check_vllm_version, f"{build} {version}")
    packages = [f"{name} {_version(name)}" for name in ("vllm-ssd", "torch")]
    python = f"Python {platform.python_version()}"
    yield Finding("versions", Status.OK, ", ".join([python, *packages]))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _plugin() -> Finding:
    from vllm import envs

    groups = ("vllm.general_plugins", "vllm.stat_logger_plugins")
    points, metrics = (metadata.entry_points(group=group, name=_PLUGIN) for group in groups)
    if not points or not metrics:
        return Finding(
            "plugin",
            Status.ERROR,
            "entry points are missing: vLLM does not find it",
            "install vllm-ssd anew, into vLLM's environment (pip install)",
        )
    allowed = envs.VLLM_PLUGINS
    if allowed is not None and _PLUGIN not in allowed:
        return Finding(
            "plugin",
            Status.ERROR,
            f"VLLM_PLUGINS = {','.join(allowed)!r} leaves it out",
            f"add {_PLUGIN!r} to VLLM_PLUGINS, or unset it",
        )
    return Finding("plugin", Status.OK, f"vLLM loads {next(iter(points)).value}")


def _hooks() -> Finding:
    from vllm_ssd import compat
    from vllm_ssd.preflight import takes_v2

    v2 = takes_v2()
    moved = compat.all_moved(v2)
    if moved:
        return Finding(
            "hooks",
            Status.ERROR,
            f"moved or changed in vLLM: {', '.join(moved)}",
            "install a vLLM that vllm-ssd supports, or another vllm-ssd",
        )
    lists = compat.lists_here(v2)
    count = sum(len(compat.members(names)) for each in lists for names in each.values())
    found = f"{count} names of vLLM are where they should be; instances are checked at the start"
    return Finding("hooks", Status.OK, found)


def _settings() -> Iterator[Finding]:
    from vllm_ssd.preflight import check_runner, takes_v2

    v2 = takes_v2()
    yield checked("model runner", lambda: check_runner(None, v2), "V2" if v2 else "V1")


# ---- the machine


def _machine() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    from vllm_ssd.draft_checks import check_device

    name = current_platform.device_name
    yield checked("platform", lambda: check_device("auto", name, None), name)
    if current_platform.is_cpu():
        yield _cores()
        yield _openmp()
        yield _bfloat16()
    elif name == "cuda":
        yield _devices()
    yield _memory()


def _cores() -> Finding:
    from vllm import envs

    from vllm_ssd.affinity import available_cores

    setting = envs.VLLM_CPU_OMP_THREADS_BIND
    if setting != "auto":
        return Finding("cores", Status.OK, f"VLLM_CPU_OMP_THREADS_BIND = {setting!r} decides")
    cores = available_cores()
    if len(cores) < 2:
        return Finding(
            "cores",
            Status.WARNING,
            "there is one: target and draft take turns on it, and SSD gains nothing",
            "give the process another core",
        )
    target = ", ".join(map(str, cores[:-1]))
    return Finding("cores", Status.OK, f"target {target}; draft {cores[-1]}")


def _openmp() -> Finding:
    from vllm_ssd.cli.env import OPENMP_RUNTIMES, openmp_library

    preloaded = os.environ.get("LD_PRELOAD", "")
    if any(name in preloaded for name in OPENMP_RUNTIMES):
        return Finding("OpenMP", Status.OK, f"preloaded: {preloaded}")
    library = openmp_library()
    if library is None:
        return Finding(
            "OpenMP",
            Status.WARNING,
            "Intel's is not installed: vLLM asks for it with speculative decoding on CPU",
            "pip install intel-openmp",
        )
    found = f"`vllm-ssd serve` and `python -m vllm_ssd.cli.env` preload {library.name}"
    return Finding("OpenMP", Status.OK, found)


def _bfloat16() -> Finding:
    from vllm_ssd.cli.engine_process import cpu_has_bfloat16

    if cpu_has_bfloat16():
        return Finding("bfloat16", Status.OK, "the CPU has instructions for it")
    return Finding(
        "bfloat16",
        Status.WARNING,
        "the CPU has no instructions for it: vLLM's matrix products are many times slower",
        "start with --dtype float32",
    )


def _devices() -> Finding:
    from vllm.platforms import current_platform

    from vllm_ssd.target.placement import count_devices

    count = current_platform.device_count()
    if count < 2:
        return Finding(
            "devices",
            Status.WARNING if count else Status.ERROR,
            f"{count_devices(count)}: the draft needs one beside the target's"
            if count
            else "no CUDA device is visible",
            "let the engine see one more (CUDA_VISIBLE_DEVICES)",
        )
    found = f"{count_devices(count)}; with one for the target, the draft takes cuda:1"
    return Finding("devices", Status.OK, found)


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}"
    return Finding("memory of the host", Status.OK, found)
