"""The counters of a running engine's worker, for the server's process: a small file in memory.

vLLM's server and its worker are different processes, and vLLM carries nothing of ours from one to
the other. The server's process makes the file if it wants the counters, and removes it; the worker
overwrites it now and then, if it is there. With several API servers one of them makes it: that one
tells the metrics of all.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import tempfile
import weakref
import zlib
from pathlib import Path

import msgspec

_HEADER = 12
"""Bytes before the content: its length and its checksum, against half of an update; the reader's
process id."""
_IN_MEMORY = Path("/dev/shm")
_ENVIRONMENT = "VLLM_SSD_INSTANCE"
"""Names the engine in all its processes. Not vLLM's ``instance_id``: each of several API servers
makes another one."""


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """What is known of the speculation at one moment."""

    counters: dict[str, float]
    """As in ``get_stats``."""
    counts: dict[str, int]
    """Of each kind of values, how many there were since the start ..."""
    recent: dict[str, list[float]]
    """... and the newest of them."""


_DECODER = msgspec.msgpack.Decoder(Snapshot)


def name_engine() -> None:
    """Name the engine that is configured now, for the processes that this one will start.

    One that vLLM has started keeps the name it was given.
    """
    if multiprocessing.parent_process() is None or _ENVIRONMENT not in os.environ:
        os.environ[_ENVIRONMENT] = secrets.token_hex(8)


def _prefix() -> str:
    return f"vllm-ssd-{os.getuid()}-"


def path() -> Path:
    """The file of the engine that was named last."""
    folder = _IN_MEMORY if _IN_MEMORY.is_dir() else Path(tempfile.gettempdir())
    return folder / f"{_prefix()}{os.environ.get(_ENVIRONMENT, 'unnamed')}"


class Reader:
    """Makes the file and reads it.

    Raises:
        FileExistsError: another process reads this engine's.
        OSError: the file cannot be made.
    """

    def __init__(self) -> None:
        its_path = path()
        _sweep(its_path.parent)
        self._file = os.open(its_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.pwrite(self._file, _pack(b""), 0)
        self.close = weakref.finalize(self, _remove, its_path, self._file, os.getpid())

    def read(self) -> Snapshot | None:
        """The newest counters; None before there are any, or while they are being written."""
        header = os.pread(self._file, _HEADER, 0)
        size, checksum = (int.from_bytes(header[at : at + 4], "little") for at in (0, 4))
        content = os.pread(self._file, size, _HEADER)
        if not size or len(content) < size or zlib.crc32(content) != checksum:
            return None
        return _DECODER.decode(content)


class Writer:
    """Overwrites the file, if there is one."""

    def __init__(self) -> None:
        self._path = path()

    @property
    def wanted(self) -> bool:
        """Whether a server's process has made the file."""
        return self._path.exists()

    def write(self, snapshot: Snapshot) -> None:
        """Overwrite it; one that is gone by now is not made again.

        Raises:
            OSError: there is no room.
        """
        with contextlib.suppress(FileNotFoundError):
            file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                reader = os.pread(file, _HEADER, 0)[8:]
                os.pwrite(file, _pack(msgspec.msgpack.encode(snapshot), reader), 0)
            finally:
                os.close(file)

    def remove(self) -> None:
        """Remove it: the engine ends."""
        self._path.unlink(missing_ok=True)


def _pack(content: bytes, reader: bytes | None = None) -> bytes:
    numbers = len(content), zlib.crc32(content)
    header = b"".join(number.to_bytes(4, "little") for number in numbers)
    return header + (reader or os.getpid().to_bytes(4, "little")) + content


def _remove(file_path: Path, file: int, process: int) -> None:
    os.close(file)
    if os.getpid() == process:  # not a fork of it
        file_path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove files of readers that were killed."""
    for one in folder.glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):
            reader = int.from_bytes(one.read_bytes()[8:_HEADER], "little")
            if reader and not Path("/proc", str(reader)).exists():
                one.unlink(missing_ok=True)
