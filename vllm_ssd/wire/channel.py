"""Frames over a stream socket: sends never block, reads take what is there.

What the socket does not take at once is sent by a thread while the caller goes on: a long text
reaches the draft while the target computes. The thread is started when it is first needed, and
sleeps while there is nothing to send.

End of file and a broken pipe both mean that the other process is gone.

A channel to a peer, a process that came by address (``network``), keeps to smaller bounds: what one
``receive`` reads, and so how long it takes and what it returns, and how long a frame may be. The
memory for a frame grows with the bytes that arrive, whatever length was announced.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import threading
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

import msgspec

Frame = TypeVar("Frame")

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 64 << 20
"""A longer frame is garbage: a prompt of 16 million tokens would fit."""
MAX_PENDING_BYTES = 64 << 20
"""What may wait for a slow reader before the channel counts as full."""
PEER_FRAME_BYTES = 16 << 20
"""The same between peers: a prompt of 4 million tokens fits."""
PEER_RECEIVE_BYTES = 256 << 10
"""What one ``receive`` reads from a peer before it returns: some 32,000 of the shortest frames,
which take some 20 milliseconds."""
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


class Stream(Protocol):
    """A connected stream socket, plain or encrypted."""

    @property
    def family(self) -> int:
        """Address family."""

    def fileno(self) -> int:
        """File descriptor."""

    def setblocking(self, flag: bool, /) -> None:
        """Whether calls wait."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set an option."""

    def send(self, data: memoryview, /) -> int:
        """Send the beginning of the data, its length; BlockingIOError if not now."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Receive bytes, how many; 0 at end of file; BlockingIOError if there are none."""

    def shutdown(self, how: int, /) -> None:
        """Wake whoever waits for it."""

    def close(self) -> None:
        """Close it."""


class Channel(Generic[Frame]):
    """One end of a connection that carries msgpack frames.

    Args:
        sock: a connected stream socket; the channel owns it.
        receives: the type of the frames that arrive here.
        max_frame_bytes: no longer frame is sent or taken.
        max_receive_bytes: what one call of :meth:`receive` reads, about; by default all there is.
    """

    def __init__(
        self,
        sock: Stream,
        receives: type[Frame],
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        max_receive_bytes: int = sys.maxsize,
    ) -> None:
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:  # TCP finds out what the way to the other end holds
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        self._socket = sock
        self._max_frame_bytes = max_frame_bytes
        self._max_receive_bytes = max_receive_bytes
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
            if len(payload) > self._max_frame_bytes:
                raise ValueError(
                    f"a frame of {len(payload)} bytes: at most {self._max_frame_bytes}"
                )
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

        No complete frame is kept back: what is left can be seen at the descriptor.

        Args:
            timeout: seconds to wait for the first byte; 0 does not wait, ``None`` waits for ever.

        Raises:
            ChannelClosedError: end of file, or a length that no frame has.
        """
        if timeout != 0.0 and not self._wait(timeout):
            return []
        ended = self._fill()
        frames = self._take_frames()
        if ended and not frames:
            raise ChannelClosedError(ended)
        return frames

    def has_input(self) -> bool:
        """Whether something has arrived that was not received yet."""
        return self._wait(0.0)

    @property
    def has_partial(self) -> bool:
        """Whether a frame has arrived in part; may be asked by another thread."""
        return bool(self._inbox)

    def _wait(self, timeout: float | None) -> bool:
        """Wait until something can be read."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000.0))

    def _fill(self) -> str:
        """Read what the socket has, but not for ever; why nothing follows, or ""."""
        left = self._max_receive_bytes
        while left > 0:
            try:
                size = self._socket.recv_into(self._arrived)
            except BlockingIOError:
                return ""
            except OSError as error:
                return f"receive: {error}"
            if not size:
                return "the other process closed the connection"
            self._inbox += self._arrived[:size]
            left -= size
        return ""

    def _take_frames(self) -> list[Frame | None]:
        """Cut complete frames off the inbox."""
        frames: list[Frame | None] = []
        inbox, decode, header = self._inbox, self._decoder.decode, _LENGTH.size
        at, arrived = 0, len(inbox)
        while (begin := at + header) <= arrived:
            (length,) = _LENGTH.unpack_from(inbox, at)
            if length > self._max_frame_bytes:
                raise ChannelClosedError(f"a frame of {length} bytes: not our protocol")
            end = begin + length
            if end > arrived:
                break
            try:
                frames.append(decode(inbox[begin:end]))
            except (msgspec.DecodeError, UnicodeError, RecursionError):  # no text, nested too deep
                frames.append(None)
            at = end
        if at:
            del inbox[:at]
        return frames


def peer_channel(sock: Stream, receives: type[Frame]) -> Channel[Frame]:
    """A channel with the bounds that both ends of a connection by address keep to."""
    return Channel(
        sock, receives, max_frame_bytes=PEER_FRAME_BYTES, max_receive_bytes=PEER_RECEIVE_BYTES
    )
