"""Frames over a local stream socket: sends never block, reads take what is there.

End of file and a broken pipe both mean that the other process is gone.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from typing import Generic, TypeVar

import msgspec

Frame = TypeVar("Frame")

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 64 << 20
"""A longer frame is garbage: a prompt of 16 million tokens would fit."""
MAX_PENDING_BYTES = 64 << 20
"""What may wait for a slow reader before the channel counts as full."""
_READ_BYTES = 256 << 10


class ChannelClosedError(ConnectionError):
    """The other process is gone, or what it sends is not a frame."""


class ChannelFullError(ConnectionError):
    """The other process does not read: the frame was not sent."""


class Channel(Generic[Frame]):
    """One end of a socket pair that carries msgpack frames.

    Args:
        sock: a connected stream socket; the channel owns it.
        receives: the type of the frames that arrive here.
    """

    def __init__(self, sock: socket.socket, receives: type[Frame]) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._inbox = bytearray()
        self._arrived = memoryview(bytearray(_READ_BYTES))
        self._outbox = bytearray()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The socket's file descriptor, for ``select``."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end; the other one sees end of file."""
        self._socket.close()

    def send(self, frame: msgspec.Struct) -> None:
        """Send without blocking; what the socket does not take now goes with a later call.

        Another thread may receive meanwhile.

        Raises:
            ValueError: the frame is longer than the other end takes.
            ChannelFullError: too much waits already; nothing of this frame was sent.
            ChannelClosedError: the other process is gone.
        """
        if len(self._outbox) > MAX_PENDING_BYTES:
            self.flush()
            if len(self._outbox) > MAX_PENDING_BYTES:
                raise ChannelFullError(f"{len(self._outbox)} bytes wait for the reader")
        payload = self._encoder.encode(frame)
        if len(payload) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {len(payload)} bytes: at most {MAX_FRAME_BYTES}")
        with self._sending:
            self._outbox += _LENGTH.pack(len(payload))
            self._outbox += payload
        self.flush()

    def flush(self) -> bool:
        """Hand over what waits; True when nothing waits any more.

        Raises:
            ChannelClosedError: the other process is gone.
        """
        with self._sending:
            while self._outbox:
                try:
                    sent = self._socket.send(self._outbox)
                except BlockingIOError:
                    return False
                except OSError as error:
                    raise ChannelClosedError(f"send: {error}") from error
                del self._outbox[:sent]
            return True

    def receive(self, timeout: float | None = 0.0) -> list[Frame | None]:
        """The frames that have arrived, in order; ``None`` in place of one that cannot be decoded.

        What waits to be sent is handed over first, as far as the socket takes it.

        Args:
            timeout: seconds to wait for the first byte; 0 does not wait, ``None`` waits for ever.

        Raises:
            ChannelClosedError: end of file, or a length that no frame has.
        """
        self.flush()
        if timeout != 0.0 and not self._wait(timeout):
            return []
        closed = self._fill()
        frames = self._take_frames()
        if closed and not frames:
            raise ChannelClosedError("the other process closed the connection")
        return frames

    def has_input(self) -> bool:
        """Whether something has arrived that was not received yet."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def _wait(self, timeout: float | None) -> bool:
        """Wait until something can be read; flushes what waits to be sent meanwhile."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._outbox else 0))
        events = poll.poll(None if timeout is None else timeout * 1000.0)
        if any(event & select.POLLOUT for _, event in events):
            self.flush()
        return any(event & ~select.POLLOUT for _, event in events)

    def _fill(self) -> bool:
        """Read what the socket has; True at end of file."""
        while True:
            try:
                size = self._socket.recv_into(self._arrived)
            except BlockingIOError:
                return False
            except OSError as error:
                raise ChannelClosedError(f"receive: {error}") from error
            if not size:
                return True
            self._inbox += self._arrived[:size]
            if size < _READ_BYTES:
                return False

    def _take_frames(self) -> list[Frame | None]:
        """Cut complete frames off the inbox."""
        frames: list[Frame | None] = []
        at = 0
        view = self._inbox
        while len(view) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(view, at)
            if length > MAX_FRAME_BYTES:
                raise ChannelClosedError(f"a frame of {length} bytes: not our protocol")
            end = at + _LENGTH.size + length
            if end > len(view):
                break
            try:
                frames.append(self._decoder.decode(bytes(view[at + _LENGTH.size : end])))
            except msgspec.DecodeError:
                frames.append(None)
            at = end
        if at:
            del self._inbox[:at]
        return frames
