"""The lines that a process prints, read by a thread: the process never waits for who reads them."""

from __future__ import annotations

import os
import queue
import threading
from pathlib import Path
from typing import IO


class Lines:
    """The lines that were not taken yet.

    Args:
        output: the process's.
        prefixes: lines that begin with none of these are left out.
        log: a file to which the lines left out are added.
    """

    def __init__(
        self, output: IO[str], prefixes: tuple[str, ...] = ("",), log: Path | None = None
    ) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(output, prefixes, log), daemon=True).start()

    def _read(self, output: IO[str], prefixes: tuple[str, ...], log: Path | None) -> None:
        with Path(log or os.devnull).open("a") as others:
            for line in output:
                if line.startswith(prefixes):
                    self._lines.put(line)
                else:
                    others.write(line)
        self._lines.put("")

    def next(self, seconds: float) -> str:
        """Wait for the next one.

        Returns:
            It, or "" if the process has ended.

        Raises:
            queue.Empty: none has come within so many seconds.
        """
        return self._lines.get(timeout=seconds)

    def take(self) -> list[str]:
        """All that have come so far."""
        return [self._lines.get() for _ in range(self._lines.qsize())]
