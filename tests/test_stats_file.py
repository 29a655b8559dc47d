"""The counters on their way to the server's process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_ssd import stats_file
from vllm_ssd.core.recent import KEPT, Recent
from vllm_ssd.stats_file import Reader, Snapshot, Writer, name_engine

SNAPSHOT = Snapshot({"hits": 3.0}, {"wait_seconds": 2}, {"wait_seconds": [0.5, 0.25]})


@pytest.fixture(autouse=True)
def _named() -> Iterator[None]:
    before = os.environ.get(stats_file._ENVIRONMENT)
    name_engine()
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
    shorter = Snapshot({}, {}, {})
    writer.write(shorter)
    assert reader.read() == shorter
    reader.close()


def test_nothing_is_written_or_left_without_a_reader() -> None:
    writer = Writer()
    assert not writer.wanted
    writer.write(SNAPSHOT)
    assert not stats_file.path().exists()
    reader = Reader()
    reader.close()
    assert not stats_file.path().exists()
    with pytest.raises(OSError, match="Bad file descriptor"):
        reader.read()


def test_the_file_is_for_one_reader_and_one_user() -> None:
    reader = Reader()
    with pytest.raises(FileExistsError):
        Reader()
    assert stats_file.path().stat().st_mode & 0o777 == 0o600
    reader.close()


def test_half_of_an_update_is_not_taken() -> None:
    reader = Reader()
    Writer().write(SNAPSHOT)
    path = stats_file.path()
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
    name_engine()
    second = Reader()
    writer.write(SNAPSHOT)
    assert first.read() == SNAPSHOT
    assert second.read() is None
    first.close()
    second.close()


def test_what_a_killed_reader_has_left_is_removed() -> None:
    code = (
        "import os, signal; from vllm_ssd.stats_file import *; name_engine(); reader = Reader();"
        "print(path(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    left = Path(done.stdout.strip())
    assert left.exists()
    reader = Reader()
    assert not left.exists()
    assert stats_file.path().exists()
    reader.close()


def test_a_process_that_ends_removes_its_file() -> None:
    code = "from vllm_ssd.stats_file import *; name_engine(); reader = Reader(); print(path())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).exists()


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
