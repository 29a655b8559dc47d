"""A network in between: passes on what two ends of TCP send, later, or not at all for a while."""

from __future__ import annotations

import heapq
import itertools
import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import NamedTuple

_CHUNK = 64 << 10


class _Way(NamedTuple):
    """One direction of one connection."""

    source: socket.socket
    sink: socket.socket


class Relay:
    """Listens at a port of its own and passes on to another.

    Args:
        port: of the draft server, on the loopback interface.
        delay: seconds each way.
    """

    def __init__(self, port: int, delay: float = 0.0) -> None:
        self.delay = delay
        self._port = port
        self._cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._selector = selectors.SelectSelector()  # its patience is not rounded to milliseconds
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._late: list[tuple[float, int, _Way, bytes]] = []
        """What is under way: when it arrives, its number, where, the bytes (none: the end)."""
        self._numbers = itertools.count()
        self._partners: dict[socket.socket, socket.socket] = {}
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where targets find it."""
        return f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """From now on nothing arrives any more, and nobody is told; new connections end at once."""
        self._cut = True
        self._wake.send(b"x")

    def heal(self) -> None:
        """What was sent meanwhile arrives, as TCP sends it again; what comes later too."""
        self._cut = False
        self._wake.send(b"x")

    def reset(self) -> None:
        """Break all connections, as a restarted router does; new ones are let through."""
        for one in list(self._partners):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it."""
        self._ended = True
        self._wake.send(b"x")
        self._thread.join()
        for one in [*self._partners, self._listener, self._wake, self._woken]:
            one.close()

    # ---- the thread

    def _run(self) -> None:
        while not self._ended:
            for key, _ in self._selector.select(self._patience()):
                if key.fileobj is self._woken:
                    self._woken.recv(_CHUNK)
                    self._watch()
                elif key.fileobj is self._listener:
                    self._accept()
                elif not self._cut:
                    assert isinstance(key.fileobj, socket.socket)
                    self._take(key.fileobj)
            self._deliver()

    def _watch(self) -> None:
        """Read of nothing while it is cut: what is sent stays with the sender's system."""
        for one in self._partners:
            watched = one in self._selector.get_map()
            if self._cut and watched:
                self._selector.unregister(one)
            elif not self._cut and not watched:
                self._selector.register(one, selectors.EVENT_READ)

    def _patience(self) -> float | None:
        if self._cut or not self._late:
            return None
        return max(0.0, self._late[0][0] - time.monotonic())

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if self._cut:
            near.close()
            return
        try:
            far = socket.create_connection(("127.0.0.1", self._port))
        except OSError:
            near.close()
            return
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._partners[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _take(self, source: socket.socket) -> None:
        if source not in self._partners:
            return
        try:
            data = source.recv(_CHUNK)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(source)
        way = _Way(source, self._partners[source])
        arrives = time.monotonic() + self.delay
        heapq.heappush(self._late, (arrives, next(self._numbers), way, data))

    def _deliver(self) -> None:
        """Hand over what has arrived."""
        while not self._cut and self._late and self._late[0][0] <= time.monotonic():
            _, _, way, data = heapq.heappop(self._late)
            try:
                if data:
                    way.sink.sendall(data)
                    continue
            except OSError:
                pass
            self._part(way)

    def _part(self, way: _Way) -> None:
        """Close both ends."""
        for one in way:
            if self._partners.pop(one, None) is not None:
                with suppress(KeyError):
                    self._selector.unregister(one)
                one.close()
