"""TLS 1.3 between two ends that have the same key.

Each end shows the certificate made from the key (``keys``) and trusts no other: a connection stands
when both have proved that they have the key, and what they send is encrypted and authenticated.

Why TLS: it leaves one stream with an end of file, and so one framing and one recovery for all
links; CURVE, which knows keys without certificates, would bring messages of its own. Why a
certificate: Python has TLS with a shared key only since 3.13.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading

from vllm_ssd.wire.keys import Identity

_RECORD_BYTES = 16 << 10
"""Most bytes of a TLS record. One is written at a time, and one that was begun must be offered
again as it was: there is no more than its length to remember."""


def tls_context(identity: Identity, *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 in which both ends show this identity, without session tickets.

    Raises:
        OSError: OpenSSL refuses the certificate (or there is no ``/proc``).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a key belongs to no host
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET
    if server:
        context.num_tickets = 0
    context.load_verify_locations(cadata=identity.certificate)
    # Python takes a private key only from a file: this one is on no disk and has no name.
    file = os.memfd_create("vllm-ssd", os.MFD_CLOEXEC)
    with open(file, "wb", buffering=0) as pem:
        pem.write(identity.pem)
        context.load_cert_chain(f"/proc/self/fd/{file}")
    return context


def check_peer(connection: ssl.SSLSocket, identity: Identity) -> None:
    """After the handshake: OpenSSL has checked the other end's certificate, and it is this one.

    Raises:
        ssl.SSLError: it is another.
    """
    if connection.getpeercert(binary_form=True) != identity.certificate:
        raise ssl.SSLError("another certificate")


class TLSSocket:
    """What a channel needs of a socket, over TLS; without blocking, and for several threads.

    Args:
        connection: after the handshake; owned.
    """

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self._connection = connection
        # OpenSSL reads and writes on the same state. A finalizer may close the socket while its
        # own thread is in here: the lock lets that thread in again.
        self._lock = threading.RLock()
        self._begun = 0
        """Length of a record that is not written whole yet."""

    @property
    def family(self) -> int:
        """As of a socket."""
        return self._connection.family

    def fileno(self) -> int:
        """As of a socket. Nothing that has been decrypted waits to be read: what can be read
        shows at the descriptor, if each read has room for a record."""
        return self._connection.fileno()

    def setblocking(self, flag: bool) -> None:
        """As of a socket; only False."""
        if flag:
            raise ValueError("a TLS socket never blocks")
        self._connection.setblocking(False)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """As of a socket."""
        self._connection.setsockopt(level, option, value)

    def send(self, data: memoryview, /) -> int:
        """Send one record of the data, its length; what was begun must be offered again.

        Raises:
            BlockingIOError: not now.
            OSError: the connection is gone.
        """
        with self._lock:
            size = self._begun or min(len(data), _RECORD_BYTES)
            try:
                with data[:size] as part:
                    sent = self._connection.send(part)
            except ssl.SSLWantWriteError:
                self._begun = size
                raise BlockingIOError from None
            except ssl.SSLWantReadError:
                # Half a message of TLS itself, of a kind that our other end never sends.
                raise ConnectionError("TLS stopped") from None
            self._begun = 0
            return sent

    def recv_into(self, buffer: memoryview, /) -> int:
        """Receive a record, its length; 0 at end of file.

        Raises:
            BlockingIOError: none has arrived whole.
            OSError: the connection is gone, or something else was received.
        """
        with self._lock:
            try:
                return self._connection.recv_into(buffer)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise BlockingIOError from None

    def shutdown(self, how: int) -> None:
        """As of a socket: wake whoever waits for it."""
        # Not SSLSocket's own, which goes on without encryption.
        socket.socket.shutdown(self._connection, how)

    def close(self) -> None:
        """Close; the other end sees end of file."""
        with self._lock:
            self._connection.close()
