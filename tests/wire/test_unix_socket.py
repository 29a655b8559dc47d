"""The path of a Unix socket: who may connect, and whose it is."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_ssd.wire.address import UnixAddress
from vllm_ssd.wire.listener import Listener
from vllm_ssd.wire.network import connect

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user: needs root")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that every user can enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def path(folder: Path) -> str:
    return str(folder / "ssd.sock")


def as_nobody(act: Callable[[], bool]) -> bool:
    """Whether it does, in a process of another user's."""
    child = os.fork()
    if not child:
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os._exit(0 if act() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def stale(path: str) -> None:
    """Leave what a server that was killed leaves."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()


def test_the_path_is_the_owners_alone_from_the_start(path: str) -> None:
    before = os.umask(0)
    try:
        listener = Listener(UnixAddress(path), None)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    finally:
        os.umask(before)
    listener.close()


def test_closing_removes_the_path(path: str) -> None:
    listener = Listener(UnixAddress(path), None)
    listener.close()
    listener.close()
    assert not os.path.exists(path)
    with pytest.raises(ConnectionError, match="no such path"):
        connect(UnixAddress(path), None, 1.0)


def test_the_path_of_a_dead_server_is_replaced(path: str) -> None:
    stale(path)
    with pytest.raises(ConnectionError, match="nothing listens"):
        connect(UnixAddress(path), None, 1.0)
    listener = Listener(UnixAddress(path), None)
    connect(UnixAddress(path), None, 1.0).close()
    listener.close()


def test_a_live_server_is_refused_and_goes_on(path: str) -> None:
    listener = Listener(UnixAddress(path), None)
    with pytest.raises(OSError, match=f"unix:{path}: a server listens there"):
        Listener(UnixAddress(path), None)
    connect(UnixAddress(path), None, 1.0).close()
    listener.close()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_not_removed(path: str, kind: str) -> None:
    if kind == "file":
        Path(path).write_text("mine")
    elif kind == "directory":
        os.mkdir(path)
    else:
        stale(path + ".other")
        os.symlink(path + ".other", path)
    with pytest.raises(OSError, match="no socket"):
        Listener(UnixAddress(path), None)
    assert os.path.lexists(path)


def test_a_path_that_another_server_has_taken_over_is_left(path: str) -> None:
    first = Listener(UnixAddress(path), None)
    os.unlink(path)
    second = Listener(UnixAddress(path), None)
    first.close()
    connect(UnixAddress(path), None, 1.0).close()
    second.close()


def test_a_directory_that_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(OSError, match=f"{folder}/none/ssd.sock: No such file"):
        Listener(UnixAddress(f"{folder}/none/ssd.sock"), None)


def test_servers_that_start_at_once_do_not_replace_one_another(path: str) -> None:
    barrier = threading.Barrier(4)

    def start(_: int) -> Listener | None:
        barrier.wait()
        try:
            return Listener(UnixAddress(path), None)
        except OSError:
            return None

    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            stale(path)
            started = [listener for listener in threads.map(start, range(4)) if listener]
            assert len(started) == 1
            connect(UnixAddress(path), None, 1.0).close()
            started[0].close()


@needs_root
def test_another_user_cannot_connect(path: str) -> None:
    def refused() -> bool:
        with socket.socket(socket.AF_UNIX) as other:
            try:
                other.connect(path)
            except PermissionError:
                return True
            return False

    listener = Listener(UnixAddress(path), None)
    assert as_nobody(refused)
    listener.close()


@needs_root
def test_another_user_is_turned_away_whatever_the_mode(path: str) -> None:
    def turned_away() -> bool:
        with socket.socket(socket.AF_UNIX) as other:
            other.settimeout(5.0)
            other.connect(path)
            return other.recv(1) == b""

    listener = Listener(UnixAddress(path), None)
    os.chmod(path, 0o666)
    assert as_nobody(turned_away)
    assert listener.accept() == []
    listener.close()


@needs_root
def test_a_server_of_another_user_is_not_talked_to(folder: Path, path: str) -> None:
    folder.chmod(0o777)
    listening, done = os.pipe(), os.pipe()

    def impostor() -> bool:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen()
            os.write(listening[1], b"1")
            os.read(done[0], 1)
        return True

    child = os.fork()
    if not child:
        os._exit(0 if as_nobody(impostor) else 1)
    os.read(listening[0], 1)
    with pytest.raises(ConnectionError, match=f"user {NOBODY}'s"):
        connect(UnixAddress(path), None, 1.0)
    os.write(done[1], b"1")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for descriptor in (*listening, *done):
        os.close(descriptor)
