"""The counters on their way to the server's process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_ssd import stats_file
from vllm_ssd.core.recent import KEPT, Recent
from vllm_ssd.stats_file import Reader, Snapshot, Writer, name_engine

SNAPSHOT = Snapshot({"hits": 3.0}, {"wait_seconds": 2}, {"wait_seconds": [0.5, 0.25]}, [0, 3])


MAKE_A_FILE = """
from vllm_ssd.stats_file import *
name_engine(inherits=False)
reader = Reader()
print(path(), flush=True)
"""


def its_path() -> Path:
    path = stats_file.path()
    assert path is not None
    return path


@pytest.fixture(autouse=True)
def _named() -> Iterator[None]:
    before = os.environ.get(stats_file._ENVIRONMENT)
    name_engine(inherits=False)
    yield
    if before is None:
        del os.environ[stats_file._ENVIRONMENT]
    else:
        os.environ[stats_file._ENVIRONMENT] = before


def test_what_was_written_is_read() -> None:
    reader, writer = Reader(), Writer()
    assert reader.read() is None
    assert writer.wanted
    writer.write(SNAPSHOT)
    assert reader.read() == SNAPSHOT
    shorter = Snapshot({}, {}, {}, [])
    writer.write(shorter)
    assert reader.read() == shorter
    reader.close()


def test_nothing_is_written_or_left_without_a_reader() -> None:
    writer = Writer()
    assert not writer.wanted
    writer.write(SNAPSHOT)
    assert not its_path().exists()
    reader = Reader()
    reader.close()
    assert not its_path().exists()
    with pytest.raises(OSError, match="Bad file descriptor"):
        reader.read()


def test_the_file_is_for_one_reader_and_one_user() -> None:
    reader = Reader()
    with pytest.raises(FileExistsError):
        Reader()
    assert its_path().stat().st_mode & 0o777 == 0o600
    reader.close()


def test_half_of_an_update_is_not_taken() -> None:
    reader = Reader()
    Writer().write(SNAPSHOT)
    path = its_path()
    content = path.read_bytes()
    for broken in (content[:-1], content[:20] + bytes([content[20] ^ 1]) + content[21:], b""):
        path.write_bytes(broken)
        assert reader.read() is None
    path.write_bytes(content)
    assert reader.read() == SNAPSHOT
    reader.close()


def test_each_engine_of_a_process_has_its_own_file() -> None:
    first = Reader()
    writer = Writer()
    name_engine(inherits=False)
    second = Reader()
    writer.write(SNAPSHOT)
    assert first.read() == SNAPSHOT
    assert second.read() is None
    first.close()
    second.close()


def test_what_a_killed_reader_has_left_is_removed() -> None:
    code = MAKE_A_FILE + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    left = Path(done.stdout.strip())
    assert left.exists()
    reader = Reader()
    assert not left.exists()
    assert its_path().exists()
    reader.close()


def test_a_process_that_ends_removes_its_file() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAKE_A_FILE], capture_output=True, text=True, check=True
    )
    assert not Path(done.stdout.strip()).exists()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    writer, victim = Writer(), tmp_path / "victim"
    victim.write_text("untouched")
    its_path().symlink_to(victim)
    pipe = its_path().with_name(f"{stats_file.prefix()}pipe")
    os.mkfifo(pipe)
    try:
        with pytest.raises(OSError, match="symbolic links"):
            writer.write(SNAPSHOT)
        assert victim.read_text() == "untouched"
        name_engine(inherits=False)
        Reader().close()  # does not wait for the pipe
        assert pipe.exists()
    finally:
        pipe.unlink()
        writer.remove()


def test_nothing_is_left_where_there_is_no_room() -> None:
    files, (soft, hard) = (
        set(os.listdir("/proc/self/fd")),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            Reader()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not its_path().exists()
    assert set(os.listdir("/proc/self/fd")) <= files


def test_what_a_living_reader_reads_is_not_swept() -> None:
    first = Reader()
    name_engine(inherits=False)
    second, writer = Reader(), Writer()
    writer.write(SNAPSHOT)
    assert second.read() == SNAPSHOT
    assert its_path().exists()
    first.close()
    second.close()


def test_an_api_server_among_several_keeps_the_name() -> None:
    before = its_path()
    name_engine(inherits=True)
    assert its_path() == before
    name_engine(inherits=False)
    assert its_path() != before


def test_an_engine_without_a_name_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(stats_file._ENVIRONMENT)
    writer = Writer()
    assert not writer.wanted
    writer.write(SNAPSHOT)
    writer.remove()
    with pytest.raises(OSError, match="no name"):
        Reader()


def test_the_newest_values_are_kept() -> None:
    recent = Recent()
    assert recent.since(0) == []
    recent.extend([1.0, 2.0])
    recent.add(3.0)
    assert recent.since(0) == [1.0, 2.0, 3.0]
    assert recent.since(2) == [3.0]
    assert recent.since(3) == recent.since(9) == []
    recent.extend([0.0] * KEPT)
    assert recent.count == KEPT + 3
    assert recent.since(0) == [0.0] * KEPT
