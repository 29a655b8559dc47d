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
from collections.abc import Callable, Iterator
from enum import StrEnum
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_ssd.config import SSDConfig

_PLUGIN = "ssd"
"""The name of our entry point."""
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


class Status(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    WARNING = "warning"
    """SSD works, but slowly or not for everything."""
    ERROR = "error"
    """SSD would refuse to start."""


class Finding(NamedTuple):
    """The result of one check."""

    check: str
    status: Status
    found: str
    mend: str = ""


def run(target: str | None, draft: str | None, as_json: bool) -> bool:
    """Check everything and print what was found.

    Args:
        target: folder or hub name of the target; None for no pair.
        draft: of the draft.
        as_json: print JSON in place of a table.

    Returns:
        Whether SSD can start.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs there
        findings = list(_all_findings(target, draft))
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


def _all_findings(target: str | None, draft: str | None) -> Iterator[Finding]:
    """The findings; what a check did not expect ends them, as the last one."""
    try:
        yield from _examine(target, draft)
    except Exception as error:  # of vLLM, transformers, the hub: what was found so far still counts
        said = f"{type(error).__name__}: {error}"
        yield Finding("doctor", Status.ERROR, said, "report this, with the findings above")


def _examine(target: str | None, draft: str | None) -> Iterator[Finding]:
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
    if target is not None and draft is not None:
        yield from _pair(target, draft)


# ---- what is installed


def _versions() -> Iterator[Finding]:
    from vllm_ssd.compat import check_vllm_version, vllm_version

    build, version = vllm_version()
    yield _checked("vLLM", check_vllm_version, f"{build} {version}")
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

    moved = compat.all_moved()
    if moved:
        return Finding(
            "hooks",
            Status.ERROR,
            f"moved or changed in vLLM: {', '.join(moved)}",
            "install a vLLM that vllm-ssd supports, or another vllm-ssd",
        )
    lists = compat.lists_here()
    count = sum(len(compat.members(names)) for each in lists for names in each.values())
    found = f"{count} names of vLLM are where they should be; instances are checked at the start"
    return Finding("hooks", Status.OK, found)


def _settings() -> Iterator[Finding]:
    from vllm_ssd.preflight import check_runner

    yield _checked("model runner", lambda: check_runner(None), "V1")


# ---- the machine


def _machine() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    from vllm_ssd.preflight import check_device

    name = current_platform.device_name
    yield _checked("platform", lambda: check_device("auto", name, None), name)
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


# ---- the pair


def _pair(target_name: str, draft_name: str) -> Iterator[Finding]:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ssd.config import SSDConfig
    from vllm_ssd.draft_vocab import select_draft_vocab
    from vllm_ssd.preflight import check_draft
    from vllm_ssd.target.draft_config import draft_model_config, first_line
    from vllm_ssd.vocabulary import check_vocabulary

    try:
        target = EngineArgs(model=target_name).create_model_config()
    except Exception as error:  # vLLM, transformers and hub clients each raise their own
        mend = (
            "give the folder or the hub name of a model that this vLLM supports; with options of "
            "its own (--trust-remote-code, --hf-token) only the server itself can tell"
        )
        yield Finding("target", Status.ERROR, f"{target_name}: {first_line(error)}", mend)
        return
    yield Finding("target", Status.OK, f"{target.model}, {target.max_model_len} tokens")
    config = SSDConfig.parse({"model": draft_name, "num_speculative_tokens": 4})
    try:
        draft = draft_model_config(config, target)
    except ValueError as error:
        yield _refused("draft", error)
        return
    longest, length = draft.max_model_len, target.max_model_len
    short = longest < length
    yield Finding(
        "draft",
        Status.WARNING if short else Status.OK,
        f"{draft.model}, {longest} tokens" + (f", fewer than the target's {length}" * short),
        "longer texts are decoded plainly; choose another draft, or lower --max-model-len" * short,
    )
    attention = _checked("attention", lambda: check_draft(draft), "full: it can be forked")
    yield attention
    if attention.status == Status.ERROR:
        return
    sizes = f"{draft.get_vocab_size()} tokens, the target's {target.get_vocab_size()}"
    yield _vocabulary(sizes, lambda: check_vocabulary(config, target, draft))
    try:
        head = select_draft_vocab(config, target, draft)
    except ValueError as error:
        yield _refused("head", error)
        return
    rows = None if head is None else len(head)
    yield Finding("head", Status.OK, "all tokens" if rows is None else f"{rows} tokens")
    yield _draft_memory(config, draft, rows)


def _vocabulary(sizes: str, check: Callable[[], bool]) -> Finding:
    try:
        compared = check()
    except ValueError as error:
        return _refused("vocabulary", error)
    if compared:
        return Finding("vocabulary", Status.OK, sizes)
    return Finding(
        "vocabulary",
        Status.WARNING,
        f"{sizes}; the tokenizers could not be read, so they were not compared",
        "see that both models have the same tokenizer",
    )


def _draft_memory(config: SSDConfig, draft: ModelConfig, head_rows: int | None) -> Finding:
    from vllm.platforms import current_platform

    from vllm_ssd.target import memory
    from vllm_ssd.target.checkpoint import checkpoint_tensors

    tensors = checkpoint_tensors(draft.model, config.draft_revision, None)
    weights = memory.weight_bytes(
        tensors,
        memory.shape_of(draft),
        draft.dtype.itemsize,
        head_rows,
        current_platform.is_cpu(),
    )
    kv = memory.draft_kv_bytes_per_token(draft)
    found = f"weights {weights / 2**20:.0f} MiB, KV cache {kv / 2**10:.0f} KiB a token"
    return Finding("memory of the draft", Status.OK, found)


# ---- refusals


def _checked(check: str, call: Callable[[], object], found: str) -> Finding:
    """``found`` if a check passes, else its refusal."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return _refused(check, error)
    return Finding(check, Status.OK, found)


def _refused(check: str, error: Exception) -> Finding:
    """A refusal of ours: one sentence, the mend behind the last semicolon."""
    found, _, mend = str(error).removeprefix("ssd: ").rpartition("; ")
    return Finding(check, Status.ERROR, found or mend, mend if found else "")
