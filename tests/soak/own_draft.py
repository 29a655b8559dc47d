"""A server whose draft is a process of its own, and what can happen to the two."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.robustness import harness
from tests.robustness.scripts import START_SECONDS
from tests.robustness.serving import Server, stats_of
from tests.soak.setup import SPECULATION, Fault, Setup
from tests.tiny_models import TinyModels

SLOW_SECONDS = 8.0
SLOWER = 10
TURN_SECONDS = 0.05
"""The draft is let run for a tenth of that, and stopped for the rest."""
SET_BACK_SECONDS = 3600
TOO_LITTLE = 512 << 20
"""Bytes of address space, in which torch alone does not fit."""
FAILED_STARTS = 2
DISK_SIZE, MEMORY_DISK_SIZE = "64m", "512m"


class OwnDraft(Setup):
    """The server has file systems of its own for ``TMPDIR`` and ``/dev/shm``, and a clock."""

    def __init__(self, models: TinyModels, folder: Path) -> None:
        self._clock = _Clock(folder) if shutil.which("cc") else None
        self._disk = folder / "disk"
        self._disk.mkdir()
        mounts = _may_mount()
        environment = {"VLLM_CACHE_ROOT": str(self._disk / "cache")}
        if self._clock is not None:
            environment |= self._clock.environment
        super().__init__(
            Server(
                models.target,
                self._disk,
                environment,
                _with_disks(self._disk) if mounts else (),
                speculative_config=json.dumps({**SPECULATION, "model": str(models.near)}),
            )
        )
        self.faults = {
            "draft killed": Fault(self._kill),
            "draft stopped": Fault(self._stop),
            f"draft {SLOWER} times slower": Fault(self._slow_down),
        }
        if self._clock is not None:
            self.faults["clock set back by an hour"] = Fault(self._set_back)
        if mounts:
            self.faults["disk full, draft killed"] = Fault(self._fill_disks)
        # The last one: failed starts are paused for longer and longer.
        self.faults["draft killed, no memory for the next"] = Fault(self._leave_no_memory)

    def draft(self) -> int:
        """Its process."""
        (pid,) = self.server.drafts()
        return pid

    def _kill(self) -> str:
        os.kill(self.draft(), signal.SIGKILL)
        return ""

    def _stop(self) -> str:
        stopped = self.draft()
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        harness.wait_for(lambda: not harness.is_alive(stopped), START_SECONDS, "it is replaced")
        return f"replaced after {time.monotonic() - began:.1f} s"

    def _slow_down(self) -> str:
        draft = self.draft()
        before, usual = stats_of(self.server), self.hits.step_seconds
        until = time.monotonic() + SLOW_SECONDS
        try:
            while time.monotonic() < until:
                os.kill(draft, signal.SIGSTOP)
                time.sleep(TURN_SECONDS * (1 - 1 / SLOWER))
                os.kill(draft, signal.SIGCONT)
                time.sleep(TURN_SECONDS / SLOWER)
        finally:
            os.kill(draft, signal.SIGCONT)
        after = stats_of(self.server)
        steps = after["draft_steps"] - before["draft_steps"]
        seconds = (after["draft_step_seconds"] - before["draft_step_seconds"]) / max(1.0, steps)
        return f"stopped for 9/10 of the time: a step took {seconds / usual:.0f} times as long"

    def _set_back(self) -> str:
        assert self._clock is not None
        self._clock.set(-SET_BACK_SECONDS)
        for pid in self.server.processes():
            assert self._clock.is_used_by(pid), harness.command(pid)
        answer = self.server.client.completions.create(model="tiny", prompt="w5", max_tokens=1)
        behind = time.time() - answer.created
        assert behind > SET_BACK_SECONDS - START_SECONDS, "the clock was not set back"
        return f"answers are dated {behind:.0f} s back"

    def _fill_disks(self) -> str:
        root = Path(f"/proc/{self.server.pid}/root")
        disks = [root / self._disk.relative_to("/"), root / "dev" / "shm"]
        for disk in disks:
            _fill(disk)
        restarts = stats_of(self.server)["restarts"]
        self._kill()

        def is_up_again() -> bool:
            stats = stats_of(self.server)
            return stats["restarts"] > restarts and bool(stats["draft_up"])

        try:
            harness.wait_for(is_up_again, START_SECONDS, "a draft without a disk")
            assert not any(shutil.disk_usage(disk).free for disk in disks)
        finally:
            for disk in disks:
                (disk / "filler").unlink()
        return "a new draft came up on the full disk"

    def _leave_no_memory(self) -> str:
        killed = self.draft()
        os.kill(killed, signal.SIGKILL)
        limited: set[int] = set()

        def failed() -> bool:
            for pid in set(self.server.drafts()) - limited - {killed}:
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).rlimit(resource.RLIMIT_AS, (TOO_LITTLE, TOO_LITTLE))
                    limited.add(pid)
            return len(limited) == FAILED_STARTS and not any(map(harness.is_alive, limited))

        harness.wait_for(failed, START_SECONDS, f"{FAILED_STARTS} failed starts")
        return f"{FAILED_STARTS} starts failed"


class _Clock:
    """A wall clock for a server, which can be set; other clocks stay."""

    def __init__(self, folder: Path) -> None:
        self._library = folder / "clock.so"
        self._file = folder / "clock"
        source = Path(__file__).with_name("clock.c")
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O2", "-o", self._library, source, "-ldl"], check=True
        )
        self.set(0)
        self.environment = {"LD_PRELOAD": str(self._library), "SOAK_CLOCK_FILE": str(self._file)}

    def set(self, seconds: int) -> None:
        """Let it run so many seconds ahead."""
        file = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(file, struct.pack("l", seconds), 0)
        os.close(file)

    def is_used_by(self, pid: int) -> bool:
        """Whether the process has this clock."""
        return str(self._library) in Path(f"/proc/{pid}/maps").read_text()


def _may_mount() -> bool:
    """Whether this user may give a process file systems of its own."""
    command = ["unshare", "--mount", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command).returncode == 0


def _with_disks(disk: Path) -> list[str]:
    """A command that runs another one with small file systems at ``disk`` and in memory."""
    script = (
        f'mount -t tmpfs -o size={DISK_SIZE} none "$0" && '
        f'mount -t tmpfs -o size={MEMORY_DISK_SIZE} none /dev/shm && exec "$@"'
    )
    return ["unshare", "--mount", "sh", "-c", script, str(disk)]


def _fill(disk: Path) -> None:
    """Leave no byte free."""
    file = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while True:
            os.write(file, bytes(1 << 20))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    finally:
        os.close(file)
