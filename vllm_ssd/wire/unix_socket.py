"""A Unix socket for one user: who may reach it, and whose path it is."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_CREDENTIALS = struct.Struct("3i")
_BACKLOG = 128
_LOCK_SECONDS = 1.0
_LIVE_SECONDS = 1.0


class PrivateSocket:
    """A listening Unix socket that only its owner, and root, can connect to.

    The socket of a server that is gone is replaced; nothing else is removed.

    Args:
        path: where it is to be found; its directory exists.

    Raises:
        OSError: a live server listens there, it is another kind of file, or the path cannot be
            made; the message is a sentence with the path.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The mode that the path is made with: there is no moment in which others can connect.
            os.fchmod(self.socket.fileno(), 0o600)
            with _alone_in(os.path.dirname(path)):
                _remove_stale(path)
                self.socket.bind(path)
                made = os.lstat(path)
                self.socket.listen(_BACKLOG)
        except OSError as error:
            self.socket.close()
            raise OSError(error.errno, f"cannot listen at unix:{path}: {error.strerror}") from None
        self._made = made.st_dev, made.st_ino

    def close(self) -> None:
        """Close it and remove the path, unless another server has it now."""
        with suppress(OSError):
            found = os.lstat(self.path)
            # While the socket is open, no other file gets this number.
            if (found.st_dev, found.st_ino) == self._made:
                os.unlink(self.path)
        self.socket.close()


def peer_process(connection: socket.socket) -> int:
    """The process at the other end, if it runs as this user or as root.

    Raises:
        PermissionError: it runs as another user.
    """
    size = _CREDENTIALS.size
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    process, user, _group = _CREDENTIALS.unpack(found)
    ours = os.geteuid()
    if user not in (ours, 0):
        raise PermissionError(errno.EPERM, f"the other end is user {user}'s, this one {ours}'s")
    return int(process)


def _remove_stale(path: str) -> None:
    """Remove the socket of a server that is gone, if there is one."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "there is a file, and no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_LIVE_SECONDS)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except (BlockingIOError, TimeoutError):  # it listens, and is busy
            pass
    raise OSError(errno.EADDRINUSE, "a server listens there already; end it or choose another path")


@contextmanager
def _alone_in(directory: str) -> Iterator[None]:
    """Two servers that start at once must not each take the other's new socket for a stale one."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Whoever can read the directory can lock it.
                if time.monotonic() > deadline:
                    raise OSError(
                        errno.EBUSY, "another process has locked the directory; choose another"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)
