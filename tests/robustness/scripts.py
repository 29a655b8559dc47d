"""Running ``script.py`` in a session of its own, so that all it starts can be found."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.lines import Lines
from tests.robustness import harness
from tests.tiny_models import TinyModels

START_SECONDS = 240.0
"""An engine starts within this time on a busy machine."""


class Script:
    """A script that is running.

    Args:
        command: what to run.
        folder: its directory for temporary files.
        environment: settings beside the test's own.
        wrapper: a command that runs the script as its arguments.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: dict[str, str],
        wrapper: Sequence[str] = (),
    ) -> None:
        self.temporary = folder
        self._process = subprocess.Popen(
            [*wrapper, sys.executable, *command],
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(folder), **environment},
            start_new_session=True,
            text=True,
        )
        assert self._process.stdout is not None
        self._lines = Lines(self._process.stdout)

    @property
    def pid(self) -> int:
        """Process id, which is that of its session too."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its first process has not ended; it may be replacing its program just now."""
        return self._process.poll() is None

    def next_answers(self) -> Any:
        """Its next line of answers."""
        while line := self._lines.next(START_SECONDS):
            if line.startswith("["):
                with contextlib.suppress(json.JSONDecodeError):
                    return json.loads(line)
        raise AssertionError("the script has ended")

    def has_said(self, text: str) -> bool:
        """Whether a line of what it has printed since the last call has this text."""
        return any(text in line for line in self._lines.take())

    def forget_answers(self) -> None:
        """Discard what it has printed so far."""
        self._lines.take()

    def processes(self) -> list[int]:
        """All its living processes."""
        return harness.in_session(self.pid)

    def drafts(self) -> list[int]:
        """Its draft processes."""
        return [pid for pid in self.processes() if harness.is_draft(pid)]

    def signal(self, number: int) -> None:
        """Send a signal to its first process."""
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Wait until its first process has ended.

        Returns:
            Its exit status, minus the signal's number if one ended it.
        """
        return self._process.wait(seconds)

    def assert_nothing_left(self, seconds: float = harness.GONE_SECONDS) -> None:
        """No process of its session, and no file of the plugin's; vLLM leaves sockets of its own.

        Raises:
            AssertionError: says what is left after that many seconds.
        """
        deadline = time.monotonic() + seconds
        while left := self.processes():
            commands = [harness.command(pid) for pid in left]
            assert time.monotonic() < deadline, f"left behind: {commands}"
            time.sleep(0.02)
        assert not [str(path) for path in self.temporary.rglob("*ssd*")]

    def end(self) -> None:
        """End whatever is left of it."""
        self._process.kill()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def running_script(
    models: TinyModels,
    draft: Path,
    texts: Sequence[list[int]],
    max_tokens: int,
    folder: Path,
    multiprocessing: bool = False,
) -> Iterator[Script]:
    """An engine in a script of its own."""
    folder.mkdir()
    options = {
        "model": str(models.target),
        "speculative_config": harness.ssd_options(draft),
        "texts": list(texts),
        "max_tokens": max_tokens,
    }
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocessing))}
    command = ["-m", "tests.robustness.script", json.dumps(options)]
    script = Script(command, folder, environment)
    try:
        yield script
    finally:
        script.end()
