"""The key's file, and the certificate made from the key."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ssd.wire.keys import Key, identity, new_key, read_key, write_key


def test_a_written_key_is_read_again_and_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    before = os.umask(0)
    try:
        key = write_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch("[0-9a-f]{64}\n", path.read_text())
    assert read_key(path) == key


def test_keys_are_different_and_are_not_printed() -> None:
    first, second = new_key(), new_key()
    assert first != second
    assert first.secret.hex() not in repr(first)
    assert repr(first.secret) not in repr(first)


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = write_key(path)
    with pytest.raises(FileExistsError, match=re.escape(str(path))):
        write_key(path)
    assert read_key(path) == key


def test_the_mend_that_is_named_makes_a_key(tmp_path: Path) -> None:
    path = tmp_path / "the key"
    with pytest.raises(ValueError, match="there is none; make one: ") as missing:
        read_key(path)
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    made = str(missing.value).split("make one: ")[1]
    subprocess.run(made, shell=True, check=True, env={**os.environ, "PATH": commands})
    assert read_key(path) != new_key()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "only 0 characters"),
        ("ab" * 16 + "\n", "only 32 characters"),
        ("ab" * 31 + "\n", "only 62 characters"),
        ("ab" * 33, "nothing else"),
        ("ab" * 32 + "\n\n", "nothing else"),
        ("ab" * 32 + "\r\n", "nothing else"),
        ("password" * 8, "hexadecimal"),
        ("ab" * 31 + " a\n", "hexadecimal"),
        ("ａ" * 64, "hexadecimal"),
    ],
)
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "key"
    path.write_text(content, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(ValueError, match=reason) as refused:
        read_key(path)
    assert str(path) in str(refused.value)
    assert "make one" in str(refused.value)
    assert not content[:8] or content[:8] not in str(refused.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o660])
def test_a_key_that_others_get_at_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    write_key(path)
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"chmod 600 {re.escape(str(path))}"):
        read_key(path)


@pytest.mark.timeout(10)
def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_key(path)


def test_a_key_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="31 bytes"):
        Key(bytes(31))


def test_the_certificate_of_a_key_is_always_the_same() -> None:
    # Both ends make it, with whatever versions they have: it must never change.
    certificate = identity(Key(bytes(range(32)))).certificate
    fingerprint = hashlib.sha256(certificate).hexdigest()
    assert fingerprint == "87c2de66eb4bee0fc217ff7096d76366793d9c40944d053bd92ef67aa6b3aeee"


def test_another_key_has_another_certificate() -> None:
    assert identity(new_key()).certificate != identity(new_key()).certificate
