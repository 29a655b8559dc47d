"""A server on a thread that answers every frame, as a shared draft server's loop would."""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from vllm_ssd.wire.address import TCPAddress
from vllm_ssd.wire.channel import Channel, ChannelClosedError, Stream, peer_channel
from vllm_ssd.wire.keys import Key
from vllm_ssd.wire.listener import Listener
from vllm_ssd.wire.messages import DraftBound, Finished, Stepped, TargetBound, ToDraft
from vllm_ssd.wire.network import connect

MEGABYTE = 1 << 20


class EchoServer:
    """Takes peers and frames; answers each with as many bytes as it brought."""

    def __init__(self, listener: Listener, key: Key | None) -> None:
        self.listener = listener
        self.key = key
        self.frames = 0
        """Received, of all peers."""
        self.garbled = 0
        self.peers: dict[int, Channel[DraftBound]] = {}
        self.error: Exception | None = None
        self._end, self._ended = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> EchoServer:
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._ended, b"1")
        self._thread.join()
        self.listener.close()
        os.close(self._end)
        os.close(self._ended)
        if self.error is not None:
            raise self.error

    def connect(self, timeout_s: float = 5.0) -> Stream:
        """A connection to it, with its key."""
        return connect(self.listener.address, self.key, timeout_s)

    def target(self) -> Channel[TargetBound]:
        """A target's channel to it."""
        return peer_channel(self.connect(), TargetBound)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            self.error = error
        for peer in self.peers.values():
            peer.close()

    def _serve(self) -> None:
        while True:
            watched = [self._end, self.listener.fileno(), *self.peers]
            ready, _, _ = select.select(watched, [], [])
            if self._end in ready:
                return
            for stream in self.listener.accept():
                channel = peer_channel(stream, DraftBound)
                self.peers[channel.fileno()] = channel
            for descriptor in set(ready) & self.peers.keys():
                self._answer(descriptor)

    def _answer(self, descriptor: int) -> None:
        peer = self.peers[descriptor]
        try:
            for frame in peer.receive():
                self.frames += 1
                if frame is None:
                    self.garbled += 1
                    continue
                size = sum(
                    len(message.handles)
                    for message in frame.messages
                    if isinstance(message, Finished)
                )
                peer.send(answer(frame.epoch, frame.number, size))
        except ConnectionError:
            self.peers.pop(descriptor).close()


def question(number: int, size: int = 0) -> DraftBound:
    """A frame with so many bytes."""
    messages: list[ToDraft] = [Finished(b"\x01" * size)]
    return DraftBound(0, number, messages)


def answer(epoch: int, number: int, size: int) -> TargetBound:
    """What the server answers."""
    return TargetBound(epoch, number, [Stepped(b"", b"", b"", b"", q_tokens=b"\x02" * size)])


def encoded(frame: msgspec.Struct) -> bytes:
    """As a channel sends it."""
    payload = msgspec.msgpack.encode(frame)
    return struct.pack("<I", len(payload)) + payload


def is_answered(target: Channel[TargetBound], number: int, size: int = 100) -> bool:
    """Whether the server answers a frame, in five seconds."""
    target.send(question(number, size))
    deadline = time.monotonic() + 5.0
    got: list[TargetBound | None] = []
    while not got and time.monotonic() < deadline:
        got = target.receive(timeout=5.0)
    return got == [answer(0, number, size)]


def push(stream: Stream, data: bytes) -> bool:
    """Send bytes as they are; False if the other end has closed."""
    writable = select.poll()
    writable.register(stream.fileno(), select.POLLOUT)
    stream.setblocking(False)
    with memoryview(data) as left:
        at = 0
        while at < len(left):
            try:
                with left[at:] as part:
                    at += stream.send(part)
            except BlockingIOError:
                writable.poll(5000)
            except OSError:
                return False
    return True


def is_closed(stream: Stream | socket.socket, timeout_s: float = 5.0) -> bool:
    """Whether the other end closes the connection, whatever it sends before."""
    stream.setblocking(False)
    readable = select.poll()
    readable.register(stream.fileno(), select.POLLIN)
    deadline = time.monotonic() + timeout_s
    with memoryview(bytearray(MEGABYTE)) as buffer:
        while time.monotonic() < deadline:
            try:
                if not stream.recv_into(buffer):
                    return True
            except BlockingIOError:
                readable.poll((deadline - time.monotonic()) * 1000.0)
            except OSError:
                return True
    return False


def stranger(server: EchoServer) -> socket.socket:
    """A TCP connection to the server, with nothing sent yet."""
    address = server.listener.address
    assert isinstance(address, TCPAddress)
    return socket.create_connection((address.host, address.port), 5.0)


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether it comes true in that time."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def lost(target: Channel[TargetBound]) -> bool:
    """Whether the server has closed this target's connection, in five seconds."""
    deadline = time.monotonic() + 5.0
    with suppress(ChannelClosedError, ssl.SSLError):
        while time.monotonic() < deadline:
            target.receive(timeout=5.0)
        return False
    return True
