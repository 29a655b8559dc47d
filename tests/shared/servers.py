"""A draft server in a process of its own, started as a user starts it; its log is a file."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.robustness import harness
from vllm_ssd.wire.keys import write_key

START_SECONDS = 240.0
"""A server starts within this time on a busy machine."""
END_SECONDS = 10.0
"""A server that was asked to ends within this time."""
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce-eager": True,
    "max-model-len": harness.ENGINE["max_model_len"],
    "max-requests": 32,
    "branches": 16,
    "kv-cache-memory-bytes": 128 << 20,
}


class Server:
    """A draft server that can be started again at its address.

    Args:
        model: folder of the draft model.
        address: where it listens.
        folder: for its log.
        key_file: for TCP.
        options: of its command line, in place of :data:`OPTIONS`.
    """

    def __init__(
        self,
        model: Path,
        address: str,
        folder: Path,
        key_file: Path | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.address = address
        self.key_file = key_file
        self._options = {**OPTIONS, **(options or {})}
        self._log = folder / "server.log"
        self._log.touch()
        self._read = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process last started."""
        assert self._process is not None, "it was never started"
        return self._process

    def start(self, model: Path | None = None, options: dict[str, Any] | None = None) -> None:
        """Start it, with another model or options for this once, and wait for nothing."""
        command = [sys.executable, "-m", "vllm_ssd.cli.main", "draft-server"]
        command += ["--model", str(model or self.model), "--listen", self.address]
        if self.key_file is not None:
            command += ["--key-file", str(self.key_file)]
        for name, value in {**self._options, **(options or {})}.items():
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
        self._read = self._log.stat().st_size
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def start_and_wait(
        self, model: Path | None = None, options: dict[str, Any] | None = None
    ) -> None:
        """Start it, and wait until it listens."""
        self.start(model, options)
        self.wait_for("listens on", START_SECONDS)

    @property
    def log(self) -> str:
        """What it has said since it was last started."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            return log.read().decode()

    @property
    def targets(self) -> int:
        """How many it has by its own account."""
        counts = re.findall(r"a target (?:has joined|is gone).*?(\d+) (?:in all|left)", self.log)
        return int(counts[-1]) if counts else 0

    def wait_for(self, text: str, seconds: float) -> None:
        """Wait until it has said this.

        Raises:
            AssertionError: it did not in time, or has ended.
        """

        def said() -> bool:
            assert text in self.log or self.process.poll() is None, self.log
            return text in self.log

        harness.wait_for(said, seconds, f"{text!r} in {self.log}")

    def wait_for_targets(self, count: int, seconds: float) -> float:
        """Wait until it has so many targets.

        Returns:
            How long that took.
        """
        began = time.monotonic()
        harness.wait_for(lambda: self.targets == count, seconds, f"{count} targets: {self.log}")
        return time.monotonic() - began

    def metrics(self) -> dict[str, float]:
        """What its metrics port says, by name."""
        url = f"http://127.0.0.1:{self._options['metrics-port']}/metrics"
        with urllib.request.urlopen(url, timeout=10.0) as answer:
            lines = answer.read().decode().splitlines()
        return {line.split("{")[0]: float(line.split()[-1]) for line in lines if line[0] != "#"}

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it the hard way."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> int:
        """End it as a user does.

        Returns:
            Its exit status.
        """
        self.signal(signal.SIGTERM)
        return self.process.wait(END_SECONDS)

    def end_anyhow(self) -> None:
        """End whatever is left of it."""
        if self._process is not None:
            for pid in harness.in_session(self._process.pid):
                os.kill(pid, signal.SIGKILL)
            self._process.wait()

    def processes(self) -> list[int]:
        """All its living processes."""
        return harness.in_session(self.process.pid)


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def new_key(folder: Path) -> Path:
    """A file with a new key."""
    file = folder / "draft.key"
    write_key(str(file))
    return file


def attached(address: str, key_file: Path | None = None, **options: Any) -> dict[str, Any]:
    """The speculative config of an engine at a draft server, whose errors surface."""
    if key_file is not None:
        options = {"draft_key_file": str(key_file), **options}
    config = harness.ssd_options("", draft_address=address, **options)
    del config["model"]
    return config
