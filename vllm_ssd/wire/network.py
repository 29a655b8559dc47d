"""A target's way to a draft server, and what it shares with the server's :class:`Listener`.

Over TCP both ends prove that they have the same key before a frame is read (``tls``): also on the
loopback interface, which every user of the machine can reach. A Unix socket belongs to one user.
"""

from __future__ import annotations

import socket
import ssl
import time

from vllm_ssd.wire.address import Address, TCPAddress, UnixAddress
from vllm_ssd.wire.channel import Stream
from vllm_ssd.wire.keys import Key, identity
from vllm_ssd.wire.tls import TLSSocket, check_peer, tls_context
from vllm_ssd.wire.unix_socket import peer_process

DEAD_SECONDS = 10
"""A host that has not answered for so long is gone; so is one whose process reads nothing for so
long while more is to be sent than the system holds."""
_KEEPALIVE_IDLE_SECONDS = 4
_KEEPALIVE_INTERVAL_SECONDS = 2
_KEEPALIVE_COUNT = 3
_REFUSED_ALERTS = ("ALERT_UNKNOWN_CA", "ALERT_BAD_CERTIFICATE", "ALERT_DECRYPT_ERROR")


def connect(address: Address, key: Key | None, timeout_s: float) -> Stream:
    """Connect to a draft server; for TCP, the server has then proved that it has the key.

    A server that does not let this end in (it is busy) closes the connection: end of file.

    Args:
        address: where it listens.
        key: needed for TCP; a Unix socket does without.
        timeout_s: how long it may take, for each number of the host, when these are known.

    Raises:
        ValueError: TCP without a key, or port 0.
        TimeoutError: no answer in time.
        ConnectionError: refused, another key, no such path; the message is a sentence.
    """
    try:
        if isinstance(address, UnixAddress):
            return _connect_unix(address, timeout_s)
        return _connect_tls(address, needed(key, address), timeout_s)
    except TimeoutError:
        raise TimeoutError(f"no answer from {address} in {timeout_s:g} s") from None
    except OSError as error:
        raise ConnectionError(f"no connection to {address}: {reason_of(error)}") from error


def _connect_unix(address: UnixAddress, timeout_s: float) -> Stream:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(address.path)
        peer_process(connection)  # in a directory of everybody's, anybody can listen
    except OSError:
        connection.close()
        raise
    return connection


def _connect_tls(address: TCPAddress, key: Key, timeout_s: float) -> Stream:
    if not address.port:
        raise ValueError(f"{address}: a server's port is not 0; give the one it listens on")
    ours = identity(key)
    context = tls_context(ours, server=False)
    deadline = time.monotonic() + timeout_s
    connection = socket.create_connection((address.host, address.port), timeout_s)
    try:
        set_options(connection)
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection = context.wrap_socket(connection, do_handshake_on_connect=False)
        connection.do_handshake()
        check_peer(connection, ours)
    except OSError:
        connection.close()
        raise
    return TLSSocket(connection)


def set_options(connection: socket.socket) -> None:
    """TCP on which frames leave at once, and a dead host is noticed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_SECONDS),
        (socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_SECONDS),
        (socket.TCP_KEEPCNT, _KEEPALIVE_COUNT),
        (socket.TCP_USER_TIMEOUT, DEAD_SECONDS * 1000),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def needed(key: Key | None, address: TCPAddress) -> Key:
    """The key, which TCP needs.

    Raises:
        ValueError: there is none.
    """
    if key is None:
        raise ValueError(
            f"{address}: TCP needs a key file, the same at both ends; without one, use unix:PATH"
        )
    return key


def reason_of(error: Exception) -> str:
    """Why there is no connection: a phrase without anything that the other end has sent."""
    match error:
        case ssl.SSLCertVerificationError():
            return "the other end has another key, or another protocol"
        case ssl.SSLError(reason=str(reason)) if reason.endswith(_REFUSED_ALERTS):
            return "the other end has another key, or another protocol"
        case ssl.SSLEOFError() | ConnectionResetError() | BrokenPipeError():
            return "the other end closed the connection, as a busy server does"
        case ssl.SSLError():
            return f"not our TLS ({(error.reason or 'unknown').replace('_', ' ').lower()})"
        case FileNotFoundError():
            return "there is no such path; is the draft server running?"
        case ConnectionRefusedError():
            return "nothing listens there; is the draft server running?"
        case BlockingIOError():
            return "the draft server is busy"
        case OSError(strerror=str(text)):
            return text
    return type(error).__name__
