"""The counters of a running engine's worker, for the server's process: a small file in memory.

vLLM's server and its worker are different processes, and vLLM carries nothing of ours from one to
the other. The server's process makes the file if it wants the counters, and removes it; the worker
overwrites it now and then, if it is there. With several API servers one of them makes it: that one
tells the metrics of all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import tempfile
import weakref
import zlib
from pathlib import Path

import msgspec

_HEADER = 8
"""Bytes before the content: its length and its checksum, against half of an update."""
_LARGEST = 1 << 20
_IN_MEMORY = Path("/dev/shm")
_ENVIRONMENT = "SSD_VLLM_INSTANCE"
"""Names the engine in all its processes. Not vLLM's ``instance_id``: each of several API servers
makes another one. Nor a name of vLLM's kind: it refuses those that it does not know."""


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """What is known of the speculation at one moment."""

    counters: dict[str, float]
    """As in ``get_stats``."""
    counts: dict[str, int]
    """Of each kind of values, how many there were since the start ..."""
    recent: dict[str, list[float]]
    """... and the newest of them."""
    depths: list[int]
    """How many hits found 0, 1, 2, ... tokens."""


_DECODER = msgspec.msgpack.Decoder(Snapshot)


def name_engine(inherits: bool) -> None:
    """Name the engine that is configured now, for the processes that this one will start.

    Args:
        inherits: this is one of several API servers: the engine has its name already.
    """
    if not inherits or _ENVIRONMENT not in os.environ:
        os.environ[_ENVIRONMENT] = secrets.token_hex(8)


def path() -> Path | None:
    """The file of the engine that was named last."""
    name = os.environ.get(_ENVIRONMENT)
    folder = _IN_MEMORY if _IN_MEMORY.is_dir() else Path(tempfile.gettempdir())
    return folder / f"{prefix()}{name}" if name else None


def prefix() -> str:
    """What the names of this user's files begin with."""
    return f"vllm-ssd-{os.getuid()}-"


class Reader:
    """Makes the file and reads it.

    Raises:
        FileExistsError: another process reads this engine's.
        OSError: the file cannot be made.
    """

    def __init__(self) -> None:
        its_path = path()
        if its_path is None:
            raise OSError("the engine has no name in this process")
        _sweep(its_path.parent)
        self._file = os.open(its_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # For as long as this process lives, whatever namespace others are in.
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self.close = weakref.finalize(self, _remove, its_path, self._file, os.getpid())
        try:
            os.pwrite(self._file, _pack(b""), 0)
        except OSError:
            self.close()  # an empty file would never be swept
            raise

    def read(self) -> Snapshot | None:
        """The newest counters; None before there are any, or while they are being written."""
        header = os.pread(self._file, _HEADER, 0)
        size, checksum = (int.from_bytes(header[at : at + 4], "little") for at in (0, 4))
        if not 0 < size <= _LARGEST:
            return None
        content = os.pread(self._file, size, _HEADER)
        if len(content) < size or zlib.crc32(content) != checksum:
            return None
        return _DECODER.decode(content)


class Writer:
    """Overwrites the file, if there is one."""

    def __init__(self) -> None:
        self._path = path()

    @property
    def wanted(self) -> bool:
        """Whether a server's process has made the file."""
        return self._path is not None and self._path.exists()

    def write(self, snapshot: Snapshot) -> None:
        """Overwrite it; one that is gone by now is not made again.

        Raises:
            OSError: there is no room, or the file is another user's.
        """
        if self._path is None:
            return
        with contextlib.suppress(FileNotFoundError):
            file = _open(self._path)
            try:
                os.pwrite(file, _pack(msgspec.msgpack.encode(snapshot)), 0)
            finally:
                os.close(file)

    def remove(self) -> None:
        """Remove it: the engine ends."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _pack(content: bytes) -> bytes:
    numbers = len(content), zlib.crc32(content)
    return b"".join(number.to_bytes(4, "little") for number in numbers) + content


def _open(its_path: Path) -> int:
    """Open a file of ours; others may put what they like into a folder of all users."""
    file = os.open(its_path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    about = os.fstat(file)
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.getuid():
        os.close(file)
        raise PermissionError(errno.EPERM, "not a file of this user", str(its_path))
    return file


def _remove(its_path: Path, file: int, process: int) -> None:
    os.close(file)
    if os.getpid() == process:  # not a fork of it
        its_path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove the files of readers that were killed: nobody holds their locks."""
    for one in folder.glob(f"{prefix()}*"):
        with contextlib.suppress(OSError):
            file = _open(one)
            try:
                # An empty one is being made just now.
                if os.fstat(file).st_size:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    one.unlink(missing_ok=True)
            finally:
                os.close(file)
