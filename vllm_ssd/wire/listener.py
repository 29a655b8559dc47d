"""Where a draft server lets targets in.

A thread takes connections and goes through the handshakes, several at a time without waiting for
any of them: the server's loop sees only peers that are in. A peer that does not come through, or
takes too long, loses its connection; nothing else happens.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import ssl
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from vllm_ssd.wire.address import Address, TCPAddress, UnixAddress
from vllm_ssd.wire.channel import Stream
from vllm_ssd.wire.keys import Key, identity
from vllm_ssd.wire.network import needed, reason_of, set_options
from vllm_ssd.wire.tls import TLSSocket, check_peer, tls_context
from vllm_ssd.wire.unix_socket import PrivateSocket, peer_process

logger = logging.getLogger("vllm.vllm_ssd.net")

MAX_WAITING = 8
"""Connections on their way in, or in and not accepted yet; a further one is closed at once."""
HANDSHAKE_SECONDS = 5.0
LOG_SECONDS = 1.0
"""Peers turned away make one line in this time, however many they are."""
_BACKLOG = 128
_EXHAUSTED_SECONDS = 0.1
"""The pause when the system has no descriptor for a connection."""


@dataclass
class _Handshake:
    """A peer on its way in."""

    connection: ssl.SSLSocket
    peer: str
    deadline: float


class Listener:
    """Lets in peers that have the key (TCP) or are the same user (Unix).

    Args:
        address: where to listen; port 0 picks a free one.
        key: needed for TCP; a Unix socket does without.

    Raises:
        ValueError: TCP without a key.
        OSError: it cannot listen there; the message is a sentence.
    """

    def __init__(self, address: Address, key: Key | None) -> None:
        self.address = address
        """With the port that was picked."""
        self._private: PrivateSocket | None = None
        if isinstance(address, UnixAddress):
            self._private = PrivateSocket(address.path)
            self._socket = self._private.socket
        else:
            self._identity = identity(needed(key, address))
            self._context = tls_context(self._identity, server=True)
            self._socket = _listen(address)
            self.address = TCPAddress(address.host, self._socket.getsockname()[1])
        self._socket.setblocking(False)
        self._handshakes: dict[int, _Handshake] = {}
        self._ready: deque[Stream] = deque()
        self._signal = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._end = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self._unlogged = 0
        self._log_at = 0.0
        self._poll = select.poll()
        self._poll.register(self._end, select.POLLIN)
        self._poll.register(self._socket, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="vllm-ssd-listen", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """A descriptor that can be read when a peer is in."""
        return self._signal

    def accept(self) -> list[Stream]:
        """The peers that have come in; does not wait."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._signal)
        ready: list[Stream] = []
        while self._ready:
            ready.append(self._ready.popleft())
        return ready

    def close(self) -> None:
        """Stop listening; who was not accepted is turned away."""
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._end, 1)
        self._thread.join()
        if self._private is not None:
            self._private.close()
        self._socket.close()
        for stream in self.accept():
            stream.close()
        os.close(self._signal)
        os.close(self._end)

    # ---- the thread

    def _run(self) -> None:
        """Take connections and go on with handshakes until the listener is closed."""
        while not self._closed:
            for descriptor, _ in self._poll.poll(self._patience_ms()):
                if descriptor in self._handshakes:
                    self._shake_hands(descriptor)
                elif descriptor == self._socket.fileno():
                    self._take()
            self._drop_late()
        for handshake in self._handshakes.values():
            handshake.connection.close()

    def _patience_ms(self) -> float | None:
        """Until the first handshake is late."""
        if not self._handshakes:
            return None
        first = min(handshake.deadline for handshake in self._handshakes.values())
        return max(0.0, first - time.monotonic()) * 1000.0 + 1.0

    def _take(self) -> None:
        """Take a connection."""
        try:
            connection, source = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return  # it is gone again
        except OSError as error:
            self._log("a peer", reason_of(error))
            time.sleep(_EXHAUSTED_SECONDS)
            return
        peer = "a process" if self._private else f"{source[0]} port {source[1]}"
        if len(self._handshakes) + len(self._ready) >= MAX_WAITING:
            connection.close()
            self._log(peer, "too many at once")
            return
        try:
            connection.setblocking(False)
            if self._private:
                peer_process(connection)
                self._welcome(connection)
            else:
                set_options(connection)
                self._begin_handshake(connection, peer)
        except Exception as error:  # whatever it is, it is this peer's
            connection.close()
            self._log(peer, reason_of(error))

    def _begin_handshake(self, connection: socket.socket, peer: str) -> None:
        tls = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        self._handshakes[tls.fileno()] = _Handshake(tls, peer, deadline)
        self._poll.register(tls, select.POLLIN)

    def _shake_hands(self, descriptor: int) -> None:
        """Go on with a handshake."""
        handshake = self._handshakes[descriptor]
        connection = handshake.connection
        try:
            connection.do_handshake()
            check_peer(connection, self._identity)
        except ssl.SSLWantReadError:
            self._poll.modify(descriptor, select.POLLIN)
        except ssl.SSLWantWriteError:
            self._poll.modify(descriptor, select.POLLOUT)
        except Exception as error:  # whatever it is, it is this peer's
            self._drop(descriptor, reason_of(error))
        else:
            self._forget(descriptor)
            self._welcome(TLSSocket(connection))

    def _drop_late(self) -> None:
        now = time.monotonic()
        for descriptor, handshake in list(self._handshakes.items()):
            if now > handshake.deadline:
                self._drop(descriptor, f"no handshake in {HANDSHAKE_SECONDS:g} s")

    def _drop(self, descriptor: int, reason: str) -> None:
        handshake = self._forget(descriptor)
        handshake.connection.close()
        self._log(handshake.peer, reason)

    def _forget(self, descriptor: int) -> _Handshake:
        self._poll.unregister(descriptor)
        return self._handshakes.pop(descriptor)

    def _welcome(self, stream: Stream) -> None:
        self._ready.append(stream)
        os.eventfd_write(self._signal, 1)

    def _log(self, peer: str, reason: str) -> None:
        """A line, unless there was one just now."""
        now = time.monotonic()
        if now < self._log_at:
            self._unlogged += 1
            return
        others = f" (and {self._unlogged} before)" if self._unlogged else ""
        logger.warning("ssd: %s was turned away: %s%s", peer, reason, others)
        self._log_at, self._unlogged = now + LOG_SECONDS, 0


def _listen(address: TCPAddress) -> socket.socket:
    where = address.host, address.port
    try:
        family = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(where, family=family, backlog=_BACKLOG)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from None
