"""Run Python with Intel's OpenMP loaded first, as vLLM asks for speculative decoding on CPU.

``python -m vllm_ssd.cli.env script.py ...`` runs a script that way.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

OPENMP_RUNTIMES = ("libiomp", "libomp", "libgomp")
"""Two of them in one process disagree about threads: if one is preloaded, none is added."""


def openmp_library() -> Path | None:
    """The library that ``intel-openmp`` installed in this environment; None if it did not."""
    library = Path(sys.prefix, "lib", "libiomp5.so")
    return library if library.is_file() else None


def with_openmp() -> dict[str, str]:
    """This process's environment, with the library preloaded if there is one."""
    environment = dict(os.environ)
    library, preloaded = openmp_library(), environment.get("LD_PRELOAD", "")
    if library is not None and not any(name in preloaded for name in OPENMP_RUNTIMES):
        environment["LD_PRELOAD"] = f"{library}:{preloaded}".rstrip(":")
    return environment


def preload_openmp() -> None:
    """Start this process's program again with the library preloaded, unless it is already."""
    environment = with_openmp()
    if environment != os.environ:
        run_python(sys.orig_argv[1:], environment)


def run_python(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Replace this process by Python with these arguments; process id and standard files stay."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *arguments], environment)


if __name__ == "__main__":
    run_python(sys.argv[1:], with_openmp())
