"""Start Python with Intel's OpenMP loaded first, as vLLM's CPU speculative decoding wants it.

``python -m vllm_ssd.cli.env script.py ...`` runs a script that way.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

OPENMP_RUNTIMES = ("libiomp", "libomp", "libgomp")
"""Two of them in one process disagree about threads: who preloads one has chosen."""


def openmp_library() -> Path | None:
    """The library that ``intel-openmp`` installed in this environment, if it did."""
    library = Path(sys.prefix, "lib", "libiomp5.so")
    return library if library.is_file() else None


def preload_openmp(arguments: list[str] | None = None) -> None:
    """Replace this process by one with the library preloaded, if there is one and it is not.

    Args:
        arguments: what Python is to run instead of what it runs now.
    """
    library = openmp_library()
    preloaded = os.environ.get("LD_PRELOAD", "")
    environment = dict(os.environ)
    if library is not None and not any(name in preloaded for name in OPENMP_RUNTIMES):
        environment["LD_PRELOAD"] = f"{library}:{preloaded}".rstrip(":")
    elif arguments is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *(arguments or sys.orig_argv[1:])], environment)


if __name__ == "__main__":
    preload_openmp(sys.argv[1:])
