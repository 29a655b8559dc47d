"""Whoever has not the key: what they send is not read, and those who have it are served."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.wire.serving import (
    EchoServer,
    encoded,
    eventually,
    is_answered,
    is_closed,
    push,
    question,
    stranger,
)
from vllm_ssd.wire import listener as listener_module
from vllm_ssd.wire.address import TCPAddress, parse_address
from vllm_ssd.wire.channel import Channel, peer_channel
from vllm_ssd.wire.keys import Key, identity, new_key
from vllm_ssd.wire.listener import MAX_WAITING, Listener
from vllm_ssd.wire.messages import TargetBound
from vllm_ssd.wire.network import connect
from vllm_ssd.wire.tls import tls_context

SECRET = b"what a stranger says " * 100


@pytest.fixture
def target(tls_server: EchoServer) -> Iterator[Channel[TargetBound]]:
    """A target that is served; afterwards as well, and nobody else was."""
    channel = tls_server.target()
    assert is_answered(channel, 0)
    yield channel
    assert is_answered(channel, 1)
    assert tls_server.frames == 2
    channel.close()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the listener logs; vLLM keeps it from pytest."""
    logger = logging.getLogger("vllm.vllm_ssd.net")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def silent_server() -> tuple[socket.socket, TCPAddress]:
    """One that takes connections and says nothing."""
    server = socket.create_server(("127.0.0.1", 0))
    return server, TCPAddress("127.0.0.1", server.getsockname()[1])


def test_tcp_without_a_key_does_not_start() -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(ValueError, match=f"tcp://{host}:0: TCP needs a key file"):
            Listener(TCPAddress(host, 0), None)
    with pytest.raises(ValueError, match="TCP needs a key file"):
        connect(TCPAddress("127.0.0.1", 1), None, 1.0)


@pytest.mark.usefixtures("target")
def test_another_key_is_refused_by_both_ends(
    tls_server: EchoServer, log: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConnectionError, match="another key"):
        connect(tls_server.listener.address, new_key(), 5.0)
    assert eventually(lambda: "another key" in log.text)


@pytest.mark.parametrize("shows", ["nothing", "another key's"])
@pytest.mark.usefixtures("target")
def test_a_client_that_trusts_anybody_is_not_trusted(tls_server: EchoServer, shows: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if shows != "nothing":
        context = tls_context(identity(new_key()), server=False)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with context.wrap_socket(stranger(tls_server)) as client:
        # In TLS 1.3 the client is through before the server has seen its certificate.
        push(client, encoded(question(5)))
        assert is_closed(client)
    assert len(tls_server.peers) == 1


@pytest.mark.usefixtures("target")
def test_an_older_tls_is_refused_with_the_right_key(tls_server: EchoServer) -> None:
    assert tls_server.key is not None
    context = tls_context(identity(tls_server.key), server=False)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol version"):
        context.wrap_socket(stranger(tls_server))


@pytest.mark.parametrize(
    "sent",
    [
        encoded(question(5)),
        b"GET / HTTP/1.1\r\nHost: draft\r\n\r\n" + SECRET,
        b"\x16\x03\x01\xff\xff" + SECRET,
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00" + SECRET,
        b"\x80" + bytes(200_000),
        os.urandom(100_000),
    ],
    ids=["a frame", "http", "tls-like", "a short hello", "zeros", "noise"],
)
@pytest.mark.usefixtures("target")
def test_what_is_no_handshake_loses_its_connection(
    tls_server: EchoServer,
    log: pytest.LogCaptureFixture,
    sent: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_SECONDS", 1.0)
    with stranger(tls_server) as client:
        push(client, sent)
        assert is_closed(client)
    assert eventually(lambda: "turned away" in log.text)
    assert "stranger says" not in log.text
    assert len(tls_server.peers) == 1


def test_who_says_nothing_keeps_nobody_waiting(
    tls_server: EchoServer, target: Channel[TargetBound], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_SECONDS", 0.5)
    with stranger(tls_server) as silent, stranger(tls_server) as slow:
        slow.sendall(b"\x16\x03\x01")
        began = time.monotonic()
        tls_server.connect().close()
        assert time.monotonic() - began < 0.4
        assert is_closed(silent)
        assert is_closed(slow)
        assert 0.4 < time.monotonic() - began < 2.0


@pytest.mark.usefixtures("target")
def test_a_hundred_who_say_nothing_are_bounded(
    tls_server: EchoServer, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_SECONDS", 1.0)
    before = threading.active_count()
    clients = [stranger(tls_server) for _ in range(100)]
    began = time.monotonic()
    closed_at_once = sum(is_closed(client, 0.02) for client in clients)
    assert closed_at_once == 100 - MAX_WAITING
    assert time.monotonic() - began < 0.9
    with pytest.raises(ConnectionError, match="closed the connection"):
        tls_server.connect()
    assert threading.active_count() == before
    assert all(is_closed(client) for client in clients)
    for client in clients:
        client.close()
    tls_server.connect().close()
    assert 1 <= len(set(log.records)) <= 4  # a line a second
    assert "before)" in log.text


def test_targets_that_are_not_accepted_are_bounded() -> None:
    key = new_key()
    listener = Listener(TCPAddress("127.0.0.1", 0), key)
    targets = [connect(listener.address, key, 5.0) for _ in range(MAX_WAITING)]
    with pytest.raises(ConnectionError, match="closed the connection"):
        connect(listener.address, key, 5.0)
    assert eventually(lambda: len(listener._ready) == MAX_WAITING)
    accepted = listener.accept()
    assert len(accepted) == MAX_WAITING
    for stream in (*targets, *accepted, connect(listener.address, key, 5.0)):
        stream.close()
    listener.close()


def test_closing_turns_away_who_is_on_the_way_in() -> None:
    key = new_key()
    with EchoServer(Listener(TCPAddress("127.0.0.1", 0), key), key) as server:
        silent = stranger(server)
        time.sleep(0.05)
    assert is_closed(silent)
    silent.close()


@pytest.mark.parametrize("says", ["nothing", "noise", "goodbye"])
def test_what_is_no_draft_server_is_not_waited_for(says: str) -> None:
    server, address = silent_server()

    def talk() -> None:
        connection, _ = server.accept()
        with connection:
            if says == "noise":
                connection.sendall(os.urandom(1000))
            if says != "goodbye":
                connection.recv(1)
                time.sleep(0.5)

    talker = threading.Thread(target=talk)
    talker.start()
    expected = TimeoutError if says == "nothing" else ConnectionError
    with pytest.raises(expected, match=f"{address}"):
        connect(address, new_key(), 0.3)
    talker.join()
    server.close()


def test_nothing_listening_and_no_such_host_are_said() -> None:
    server, address = silent_server()
    server.close()
    with pytest.raises(ConnectionError, match=f"no connection to {address}: nothing listens"):
        connect(address, new_key(), 1.0)
    with pytest.raises(ConnectionError, match=r"tcp://no\.such\.invalid:1: "):
        connect(parse_address("tcp://no.such.invalid:1"), new_key(), 1.0)
    with pytest.raises(ValueError, match="port is not 0"):
        connect(TCPAddress("127.0.0.1", 0), new_key(), 1.0)


class Relay:
    """Between a target and the server: it hears all, and may change a byte."""

    def __init__(self, server: EchoServer) -> None:
        self.heard = bytearray()
        self.change_next = False
        self._server = stranger(server)
        self._socket, self.address = silent_server()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        target, _ = self._socket.accept()
        back = threading.Thread(target=self._pass_on, args=(self._server, target))
        back.start()
        self._pass_on(target, self._server)
        back.join()
        for connection in (target, self._server, self._socket):
            connection.close()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := bytearray(source.recv(65536)):
                self.heard += data
                if self.change_next and source is not self._server:
                    data[len(data) // 2] ^= 1
                sink.sendall(data)
        for connection in (source, sink):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.usefixtures("target")
def test_who_listens_in_hears_nothing_and_can_change_nothing(tls_server: EchoServer) -> None:
    relay = Relay(tls_server)
    stream = connect(relay.address, tls_server.key, 5.0)
    target = peer_channel(stream, TargetBound)
    push(stream, encoded(question(7, 0))[:3])  # no whole frame: the fixture counts them
    time.sleep(0.05)
    relay.change_next = True
    push(stream, SECRET)
    assert eventually(lambda: len(tls_server.peers) == 1)
    target.close()
    relay.thread.join()
    assert b"stranger" not in relay.heard
    assert len(relay.heard) > len(SECRET)


def test_a_key_of_another_protocol_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key(bytes(range(32)))
    before = identity(key).certificate
    monkeypatch.setattr("vllm_ssd.wire.keys._CONTEXT", b"vllm-ssd draft server, protocol 2")
    assert identity(key).certificate != before
