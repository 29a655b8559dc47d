"""Engines in processes of their own, told over their input what to decode."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.lines import Lines
from tests.robustness import harness
from tests.shared.script import Order, Report

START_SECONDS = 240.0
"""An engine starts, and answers, within this time on a busy machine."""


class EngineProcess:
    """An engine that runs ``script.py``.

    Args:
        speculative_config: of the engine.
        folder: for its log.
        name: of its log.
    """

    def __init__(self, speculative_config: dict[str, Any], folder: Path, name: str) -> None:
        self._log = folder / f"{name}.log"
        options = {"speculative_config": speculative_config}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.shared.script", json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                text=True,
            )
        assert self._process.stdout is not None
        self._lines = Lines(self._process.stdout, prefixes=("{", '"up"'), log=self._log)

    @property
    def log(self) -> str:
        """All that it has said beside its reports."""
        return self._log.read_text()

    def wait_until_up(self) -> None:
        """Wait for its start."""
        assert json.loads(self._line()) == "up"

    def order(self, order: Order) -> None:
        """Tell it what to do next."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()

    def next_report(self) -> Report:
        """What has come of the next order, or the next time of it."""
        return Report(**json.loads(self._line()))

    def forget_reports(self) -> None:
        """Discard those that have come so far."""
        self._lines.take()

    def _line(self) -> str:
        line = self._lines.next(START_SECONDS)
        assert line, f"the engine has ended: {self.log[-3000:]}"
        return line

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._process.pid, number)

    def end(self) -> None:
        """End whatever is left of it."""
        for pid in harness.in_session(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def running_engines(
    count: int, speculative_config: dict[str, Any], folder: Path
) -> Iterator[list[EngineProcess]]:
    """So many engines, started together, once they are up."""
    engines: list[EngineProcess] = []
    try:
        for number in range(count):
            engines.append(EngineProcess(speculative_config, folder, f"engine{number}"))
        for engine in engines:
            engine.wait_until_up()
        yield engines
    finally:
        for engine in engines:
            engine.end()
