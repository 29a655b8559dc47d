"""The actor: it starts the draft server as a child of its own, and tells where it listens.

The server is a process because OpenMP is preloaded and counts its cores at a start only, on the
node the actor has come to; because the actor answers at once whatever the server does; and because
a server that crashes leaves an actor that can say so. The child ends with the actor, however that
ends (``kill -9``, Ray's signals, the node's end): by the kernel's parent-death signal.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from vllm_ssd.on_ray.order import Order, Whereabouts
from vllm_ssd.target.links.process import draft_environment
from vllm_ssd.wire.address import TCPAddress
from vllm_ssd.wire.keys import new_key

FAREWELL_SECONDS = 2.0
"""An actor whose server did not come up stays so long, for the engines that wait to learn why."""


class DraftActor:
    """One draft server.

    Args:
        order: what to serve.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._key = new_key()
        self._address: TCPAddress | None = None
        self._failure = ""
        self._pid = 0
        threading.Thread(target=self._run, name="vllm-ssd-draft", daemon=True).start()

    def whereabouts(self) -> Whereabouts:
        """Whether the server is up, and where."""
        return Whereabouts(self._order.model, self._address, self._key, self._failure)

    def pids(self) -> tuple[int, int]:
        """Process ids of the actor and of its server (0: not started yet)."""
        return os.getpid(), self._pid

    def _run(self) -> None:
        """Keep the server, and end with it: the child dies with the thread that starts it."""
        import ray

        ours, theirs = Pipe()
        try:
            self._keep(ours, theirs)
        except Exception as error:  # the engines are told
            self._failure = f"{type(error).__name__}: {error}"
        if self._failure:
            time.sleep(FAREWELL_SECONDS)
        # Ray then knows that this was meant, and frees the name and the resources.
        ray.kill(ray.get_runtime_context().current_actor)

    def _keep(self, ours: Connection, theirs: Connection) -> None:
        import ray

        # Its own interpreter, and with it OpenMP, is that of the node.
        with_openmp = ["-m", "vllm_ssd.cli.env"] if self._order.on_cpu else []
        command = [sys.executable, *with_openmp, "-m", "vllm_ssd.on_ray"]
        command += ["--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
        with theirs:
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=draft_environment(os.environ, self._order.threads, None),
                stdin=subprocess.DEVNULL,
            )
        self._pid = process.pid
        try:
            ours.send((self._order, ray.util.get_node_ip_address(), self._key))
            told: TCPAddress | str = ours.recv()
            if isinstance(told, TCPAddress):
                self._address = told
            else:
                self._failure = told
        except (EOFError, OSError):  # it has ended before
            pass
        code = process.wait()
        if self._address is None:
            self._failure = self._failure or f"its process ended with exit code {code}"
        self._address = None
