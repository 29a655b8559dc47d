"""The link to a draft server: at an address (option ``draft_address``), or where Ray has put it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable

from msgspec.structs import replace

from vllm_ssd.config import SSDConfig
from vllm_ssd.wire.address import Address, TCPAddress, parse_address
from vllm_ssd.wire.channel import Channel, peer_channel
from vllm_ssd.wire.keys import Key, read_key
from vllm_ssd.wire.messages import DraftBound, Failed, Join, Ready, TargetBound
from vllm_ssd.wire.network import connect

CONNECT_SECONDS = 5.0
"""How long connecting, the proof of the key included, may take."""
ATTACH_SECONDS = 15.0
"""How long it may take in all until the draft has accepted the target."""


Find = Callable[[threading.Event], tuple[Address, Key | None]]
"""Finds where a server listens, and the key (None for a Unix socket), until an event is set; raises
OSError or ValueError with a sentence."""


class Attachment:
    """A connection to a draft server, opened by a thread: a
    :class:`vllm_ssd.target.links.link.Link`.

    Args:
        name: of the server, for the log.
        find: called by the thread, and may take its time.
    """

    pid = None
    exit_code = None

    def __init__(self, name: str, find: Find) -> None:
        self._name = name
        self._opening = _Opening()
        # Also when the engine is dropped without a shutdown.
        self.end = weakref.finalize(self, _end, self._opening, os.getpid())
        self._thread = threading.Thread(
            target=self._opening.run, args=(find,), name="vllm-ssd-attach", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads
            raise OSError(str(error)) from error

    @property
    def channel(self) -> Channel[TargetBound] | None:
        """None until it is open."""
        return self._opening.channel

    @property
    def failure(self) -> str | None:
        """Why it cannot be opened."""
        return self._opening.failure

    def wait(self, timeout: float) -> None:
        """Wait until it is open, or has failed, or was ended: nothing else depends on that."""
        if self.end.alive:
            self._thread.join(timeout)

    def __str__(self) -> str:
        """For the log."""
        return self._name


class _Opening:
    """What the thread does and finds."""

    def __init__(self) -> None:
        self.channel: Channel[TargetBound] | None = None
        self.failure: str | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def run(self, find: Find) -> None:
        try:
            address, key = find(self._ended)
            stream = connect(address, key, CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            self.failure = str(error)
            return
        channel = peer_channel(stream, TargetBound)
        with self._lock:
            if not self._ended.is_set():
                self.channel = channel
                return
        channel.close()

    def end(self) -> None:
        with self._lock:
            self._ended.set()
        if self.channel is not None:
            self.channel.close()


def _end(opening: _Opening, owner: int) -> None:
    if os.getpid() == owner:  # else this is a fork of the engine's process, exiting
        opening.end()


def server_of(config: SSDConfig) -> tuple[Address, Key | None]:
    """Where the draft server listens, and the key.

    Raises:
        ValueError: the option that is wrong.
    """
    address, key = config.draft_address, None
    try:
        parsed = parse_address(address or "")
    except ValueError as error:
        raise ValueError(f"ssd: option 'draft_address' = {address!r}: {error}") from None
    if config.draft_key_file is not None:
        try:
            key = read_key(config.draft_key_file)
        except ValueError as error:
            raise ValueError(f"ssd: option 'draft_key_file': {error}") from None
    elif isinstance(parsed, TCPAddress):
        raise ValueError(
            f"ssd: option 'draft_address' = {address!r}: TCP needs a key; set 'draft_key_file' to "
            "the file that the draft server was started with"
        )
    return parsed, key


def ask(address: Address, key: Key | None, join: Join) -> None:
    """Ask a draft server whether it would draft for a target, without joining it.

    Args:
        address: where it listens.
        key: which both ends have; None for a Unix socket.
        join: what the target wants.

    Raises:
        ValueError: it refuses the target; its sentence.
        OSError: it cannot be reached, or does not answer.
    """
    channel = peer_channel(connect(address, key, CONNECT_SECONDS), TargetBound)
    deadline = time.monotonic() + CONNECT_SECONDS
    try:
        channel.send(DraftBound(1, 0, [replace(join, stay=False)]))
        while (left := deadline - time.monotonic()) > 0.0:
            for frame in channel.receive(left):
                for answer in frame.messages if frame is not None else ():
                    if isinstance(answer, Ready):
                        return
                    if isinstance(answer, Failed):
                        raise ValueError(answer.reason)
    finally:
        channel.close()
    raise TimeoutError(f"no answer from {address} in {CONNECT_SECONDS:g} s")
