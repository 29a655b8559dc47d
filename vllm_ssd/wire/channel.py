"""Frames over a local stream socket: sends never block, reads take what is there.

What the socket does not take at once is sent by a thread while the caller goes on: a long text
reaches the draft while the target computes. The thread is started when it is first needed, and
sleeps while there is nothing to send.

End of file and a broken pipe both mean that the other process is gone.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from contextlib import suppress
from typing import Generic, TypeVar

import msgspec

Frame = TypeVar("Frame")

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 64 << 20
"""A longer frame is garbage: a prompt of 16 million tokens would fit."""
MAX_PENDING_BYTES = 64 << 20
"""What may wait for a slow reader before the channel counts as full."""
_READ_BYTES = 256 << 10
_SOCKET_BYTES = 4 << 20
"""What the socket is asked to hold (the system may allow less): all that the draft sends while the
target computes, so that nothing of it is still to be sent when the target reads."""
_SEND_BYTES = 64 << 10
"""Most bytes of one call to the socket: another sending thread waits for it, some ten
microseconds."""


class ChannelClosedError(ConnectionError):
    """The other process is gone, or what it sent is not a frame."""


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
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        self._socket = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._inbox = bytearray()
        self._arrived = memoryview(bytearray(_READ_BYTES))
        self._outbox = bytearray()
        self._sending = threading.Lock()
        self._left_over = threading.Event()
        self._sender: threading.Thread | None = None
        self._closed = False

    def fileno(self) -> int:
        """The socket's file descriptor, for ``select``."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end; the other one sees end of file."""
        if self._closed:
            return
        self._closed = True
        if self._sender is not None:
            # Wake the thread wherever it waits and join it: the descriptor may be reused next.
            self._left_over.set()
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            if self._sender is not threading.current_thread():  # a finalizer runs anywhere
                self._sender.join()
        self._socket.close()

    def send(self, *frames: msgspec.Struct) -> None:
        """Send without blocking; what the socket does not take now is sent as soon as it does.

        Another thread may receive meanwhile.

        Raises:
            ValueError: a frame is longer than the other end takes; none was sent.
            ChannelFullError: too many bytes wait already; none was sent.
            ChannelClosedError: the other process is gone.
        """
        if len(self._outbox) > MAX_PENDING_BYTES:
            self.flush()
            if len(self._outbox) > MAX_PENDING_BYTES:
                raise ChannelFullError(f"{len(self._outbox)} bytes wait for the reader")
        data = bytearray()
        for frame in frames:
            payload = self._encoder.encode(frame)
            if len(payload) > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {len(payload)} bytes: at most {MAX_FRAME_BYTES}")
            data += _LENGTH.pack(len(payload))
            data += payload
        self._append(data)

    def _append(self, data: bytes | bytearray) -> None:
        """Send bytes after all others."""
        with self._sending:
            behind = bool(self._outbox)
            self._outbox += data
        # What is left over is the thread's: the caller does not wait for a long text either.
        if (behind and self._sender is not None) or not self.flush():
            self._let_a_thread_send()

    def flush(self) -> bool:
        """Send what waits, as far as the socket takes it; True if nothing is left.

        Raises:
            ChannelClosedError: the other process is gone.
        """
        try:
            while self._outbox:
                self._send_some()
        except BlockingIOError:
            return False
        except OSError as error:
            raise ChannelClosedError(f"send: {error}") from error
        return True

    def _send_some(self) -> None:
        """Send a part of what waits."""
        with self._sending:
            with memoryview(self._outbox) as waiting, waiting[:_SEND_BYTES] as part:
                sent = self._socket.send(part)
            del self._outbox[:sent]

    def _let_a_thread_send(self) -> None:
        self._left_over.set()
        if self._sender is None:
            sender = threading.Thread(
                target=self._send_left_over, name="vllm-ssd-send", daemon=True
            )
            with suppress(RuntimeError):  # no more threads: the next call sends it
                sender.start()
                self._sender = sender

    def _send_left_over(self) -> None:
        """The thread: whenever bytes are left over, send them as the other end reads."""
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        while not self._closed:
            self._left_over.wait()
            self._left_over.clear()
            try:
                while not self._closed and not self.flush():
                    poll.poll()
            except ChannelClosedError:
                return  # the next call to send or receive raises it

    def receive(self, timeout: float | None = 0.0) -> list[Frame | None]:
        """The frames that have arrived, in order; ``None`` in place of one that cannot be decoded.

        Args:
            timeout: seconds to wait for the first byte; 0 does not wait, ``None`` waits for ever.

        Raises:
            ChannelClosedError: end of file, or a length that no frame has.
        """
        if timeout != 0.0 and not self._wait(timeout):
            return []
        closed = self._fill()
        frames = self._take_frames()
        if closed and not frames:
            raise ChannelClosedError("the other process closed the connection")
        return frames

    def has_input(self) -> bool:
        """Whether something has arrived that was not received yet."""
        return self._wait(0.0)

    def _wait(self, timeout: float | None) -> bool:
        """Wait until something can be read."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000.0))

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
