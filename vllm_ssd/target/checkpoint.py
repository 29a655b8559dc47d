"""The tensors of a model's checkpoint, if it is on this machine already."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple


class Tensor(NamedTuple):
    """One tensor, from a safetensors header."""

    dtype: str
    """As safetensors spells it: ``"F32"``, ``"BF16"``, ``"I8"``, ..."""
    elements: int
    bytes: int


Tensors = Mapping[str, Tensor]
"""By name."""


def checkpoint_tensors(model: str, revision: str | None, download_dir: str | None) -> Tensors:
    """The tensors of a checkpoint on this machine; empty if there is none in safetensors.

    Args:
        model: a folder or a hub name; of the latter only what has been downloaded is read.
        revision: of a hub name.
        download_dir: where vLLM puts what it downloads; None for the hub's own cache.
    """
    folder = _folder(model, revision, download_dir)
    if folder is None:
        return {}
    found: dict[str, Tensor] = {}
    try:
        for file in _files(folder):
            found.update(_read_header(file))
    except (OSError, ValueError, KeyError, struct.error):
        return {}  # the draft reports what is wrong with it
    return found


def _folder(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model, revision=revision, cache_dir=download_dir, local_files_only=True
            )
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _files(folder: Path) -> list[Path]:
    """The files vLLM loads: those of the index, where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    # Mistral's own spelling of the same weights.
    return [f for f in folder.glob("*.safetensors") if not f.name.startswith("consolidated")]


def _read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, from its header."""
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        header = json.loads(content.read(min(length, file.stat().st_size)))
    header.pop("__metadata__", None)
    found: dict[str, Tensor] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = Tensor(entry["dtype"], prod(entry["shape"]), end - begin)
    return found
