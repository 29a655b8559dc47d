"""Two targets on one shared draft, for a long time, with faults; then what has grown.

    python -m tests.soak.soak [--minutes 30]

Random requests (lengths, temperatures, aborts) run all the time. Every half minute or so something
happens: the draft server is killed and started again, stopped for a while, or a target is killed.
Printed at the end: requests, tokens, hits, what came back, differences from plain decoding, and the
memory and descriptors of each process soon after its start and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tests.tiny_models import tiny_models

SETTLED_SECONDS = 300.0
"""After its start, until the first measurement of a process's memory."""
WITHOUT_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"}
"""oneDNN keeps up to 1,024 kernels, one for each shape of a product that has occurred: over half an
hour some 150 MiB, in which nothing else that grows could be seen."""
FAULTS = ("server killed", "server stopped", "target stopped", "target killed")


class Process:
    """A process of the soak, started again after it was killed.

    Args:
        name: for the report.
        command: what runs.
        log: its output.
    """

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        self.figures: dict[str, Any] = {}
        self.total: dict[str, float] = {}
        """Figures of the processes that were killed before."""
        self.slowest = 0.0
        self.first: tuple[int, int] | None = None
        """Memory in bytes and descriptors, once settled."""
        self._command = command
        self._log = log
        self.start()

    def start(self) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("a"),
            env={**os.environ, **WITHOUT_CACHE},
            text=True,
        )
        self.started = time.monotonic()
        self.first = None
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("SOAK "):
                self.figures = json.loads(line[5:])
                self.slowest = max(self.slowest, self.figures["slowest_step"])

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once, and keep what it has counted."""
        self._process.kill()
        self._process.wait()
        self._keep()

    def _keep(self) -> None:
        for name, value in self.figures.items():
            self.total[name] = self.total.get(name, 0.0) + value
        self.figures = {}

    def end(self) -> int:
        """Let it end; its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self.name == "server":
            self._process.terminate()
        status = self._process.wait(60)
        time.sleep(0.5)  # its last line
        self._keep()
        return status

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def usage(self) -> tuple[int, int]:
        """Memory in bytes, and open descriptors."""
        process = psutil.Process(self._process.pid)
        return process.memory_info().rss, process.num_fds()

    def measure(self) -> None:
        """Note the first usage, once it has settled."""
        if self.first is None and time.monotonic() - self.started > SETTLED_SECONDS and self.alive:
            self.first = self.usage()


def main() -> None:
    """Run it, and print the report; the status is 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=30.0, help="seconds between faults")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fine = _soak(Path(folder), options.minutes, options.seed, options.pause)
    sys.exit(0 if fine else 1)


def _soak(folder: Path, minutes: float, seed: int, pause: float) -> bool:
    console, chance = Console(width=130), random.Random(seed)
    address, log = f"unix:{folder}/draft.sock", folder / "log"
    draft = ["-m", "vllm_ssd.cli.main", "draft-server", "--model", str(tiny_models().near)]
    draft += ["--listen", address, "--dtype", "float32", "--enforce-eager", "--max-requests", "16"]
    draft += ["--kv-cache-memory-bytes", str(64 << 20)]
    draft += ["--cores", str(max(os.sched_getaffinity(0)))]
    server = Process("server", [sys.executable, *draft], log)
    targets = [
        Process(f"target {n}", [sys.executable, "-m", "tests.soak.target", str(n), address], log)
        for n in (1, 2)
    ]
    everyone, happened = [server, *targets], dict.fromkeys(FAULTS, 0)
    try:
        _until(lambda: all(target.figures for target in targets), 300.0)
        end = time.monotonic() + 60.0 * minutes
        quiet = min(2 * SETTLED_SECONDS, 30.0 * minutes)
        while time.monotonic() < end:
            _watch(everyone, min(pause * chance.uniform(0.5, 1.5), end - time.monotonic()))
            # Nothing happens in the last ten minutes, of a short soak in its second half: what is
            # measured at the end has settled, and had so for a while.
            if time.monotonic() < end - quiet:
                fault = chance.choice(FAULTS)
                happened[fault] += 1
                console.print(f"{time.strftime('%H:%M:%S')} {fault}")
                _cause(fault, server, chance.choice(targets), chance)
    except BaseException:
        for process in everyone:
            process.kill()
        console.print(log.read_text()[-4000:], markup=False)
        raise
    last = {process.name: process.usage() for process in everyone if process.alive}
    status = {process.name: process.end() for process in reversed(everyone)}
    console.print(_report(everyone, last, status, happened, minutes))
    lost = sum(int(target.total["different"] + target.total["errors"]) for target in targets)
    fine = not lost and not any(status.values()) and not list(folder.glob("*.sock"))
    if not fine:
        console.print(log.read_text()[-4000:], markup=False)
    return fine


def _cause(fault: str, server: Process, target: Process, chance: random.Random) -> None:
    match fault:
        case "server killed":
            server.kill()
            time.sleep(chance.uniform(0.0, 4.0))
            server.start()
        case "server stopped":
            server.signal(signal.SIGSTOP)
            time.sleep(chance.uniform(0.5, 8.0))
            server.signal(signal.SIGCONT)
        case "target stopped":
            target.signal(signal.SIGSTOP)
            time.sleep(chance.uniform(0.5, 8.0))
            target.signal(signal.SIGCONT)
        case "target killed":
            target.kill()
            target.start()


def _watch(everyone: list[Process], seconds: float) -> None:
    """Wait; everyone has to live meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.5)
        for process in everyone:
            if not process.alive:
                raise RuntimeError(f"{process.name} has ended")
            process.measure()


def _until(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the targets do not start")
        time.sleep(0.5)


def _report(
    everyone: list[Process],
    last: dict[str, tuple[int, int]],
    status: dict[str, int],
    happened: dict[str, int],
    minutes: float,
) -> Table:
    faults = ", ".join(f"{count} x {fault}" for fault, count in happened.items())
    table = Table(title=f"{minutes:g} minutes; {faults}")
    columns = ("", "requests", "aborted", "tokens", "different", "errors", "hit rate", "restarts")
    for column in (*columns, "slowest step", "memory", "descriptors", "status"):
        table.add_column(column, justify="right")
    for process in everyone:
        total = process.total
        counts = [f"{total[name]:.0f}" if total else "" for name in columns[1:6]]
        hits = f"{total['hits'] / max(1.0, total['look_ups']):.2f}" if total else ""
        restarts = f"{total['restarts']:.0f}" if total else ""
        slowest = f"{process.slowest:.2f} s" if total else ""
        usage = _growth(process.first, last.get(process.name))
        row = (*counts, hits, restarts, slowest, *usage, str(status[process.name]))
        table.add_row(process.name, *row)
    return table


def _growth(first: tuple[int, int] | None, last: tuple[int, int] | None) -> tuple[str, str]:
    if first is None or last is None:
        return "", ""
    memory = f"{first[0] / (1 << 20):.0f} → {last[0] / (1 << 20):.0f} MiB"
    return memory, f"{first[1]} → {last[1]}"


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
