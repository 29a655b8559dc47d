"""Starting, watching and ending the draft process."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping

from vllm_ssd.wire.channel import Channel
from vllm_ssd.wire.messages import TargetBound

_PRIVATE_PREFIXES = ("OMP_", "GOMP_", "KMP_", "MASTER_")
_PRIVATE = (
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_DIST_IDENT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
)
"""Settings of the target's own process that would misplace the draft."""


class DraftProcess:
    """A draft process and the channel to it.

    The two share a socket pair: there is no path, no port, and end of file tells either side that
    the other is gone. The child also dies with the thread that started it. That is a thread of its
    own, so it makes no difference which of the caller's threads builds the engine or steps it.

    Args:
        cores: CPU cores the draft runs on; empty for wherever the system puts it.
        device: the one CUDA device it sees, as ``CUDA_VISIBLE_DEVICES`` names it; None on CPU.

    Raises:
        OSError: the system cannot start a process, or the thread that watches it.
    """

    def __init__(self, cores: list[int], device: str | None = None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [sys.executable, "-m", "vllm_ssd.draft"]
        command += ["--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
        if cores:
            command += ["--cores", ",".join(map(str, cores))]
        started: queue.SimpleQueue[subprocess.Popen[bytes] | Exception] = queue.SimpleQueue()

        def start_and_reap() -> None:
            try:
                process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    env=draft_environment(os.environ, len(cores), device),
                    stdin=subprocess.DEVNULL,
                )
            except Exception as error:  # raised again by the constructor, which waits for it
                started.put(error)
                return
            started.put(process)
            process.wait()

        with theirs:
            reaper = threading.Thread(target=start_and_reap, name="vllm-ssd-draft", daemon=True)
            try:
                reaper.start()
                process = started.get()
            except RuntimeError as error:  # no more threads
                process = error
        if isinstance(process, Exception):
            ours.close()
            raise OSError(f"no process: {process}") from process
        self._process = process
        self._reaper = reaper
        self.channel: Channel[TargetBound] = Channel(ours, TargetBound)
        """See :class:`vllm_ssd.target.links.link.Link`."""
        # Also when the engine is dropped without a shutdown.
        self.end = weakref.finalize(self, _end, process, self.channel, os.getpid())

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def failure(self) -> None:
        """See :class:`vllm_ssd.target.links.link.Link`: the constructor raises it."""
        return None

    def __str__(self) -> str:
        """For the log."""
        return f"draft process {self.pid}"

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative for a signal; ``None`` while it runs."""
        return self._process.poll()

    def wait(self, timeout: float) -> None:
        """Wait until it has ended."""
        self._reaper.join(timeout)


def _end(process: subprocess.Popen[bytes], channel: Channel[TargetBound], owner: int) -> None:
    """Kill the process, without waiting: it holds nothing that needs to be saved."""
    if os.getpid() != owner:
        return  # this is a fork of the engine's process, exiting
    channel.close()
    process.kill()


def draft_environment(
    target: Mapping[str, str], threads: int, device: str | None
) -> dict[str, str]:
    """The draft's environment: the target's, without what is for the target's process alone.

    Args:
        target: the target's.
        threads: how many the draft may have; 0 for no limit.
        device: the one CUDA device it sees; None on CPU.
    """
    environment = {
        name: value
        for name, value in target.items()
        if not name.startswith(_PRIVATE_PREFIXES) and name not in _PRIVATE
    }
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    # vLLM's V1 model runner is the one that both CPU and CUDA have.
    environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return environment
