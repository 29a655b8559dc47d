"""Store only what a draft does not share with its target: ``ship.py DRAFT TARGET FOLDER``.

``vllm_ssd.cli.shipped.join`` makes the whole folder again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import typer
from progress import say
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vllm_ssd.cli.shipped import CONFIG, TOKENIZER, WEIGHTS
from vllm_ssd.draft_vocab import FILE

OWN_FILES = (CONFIG, FILE, "README.md")


def ship(draft: Path, target: Path, folder: Path) -> None:
    """Write the draft's own weights and files to ``folder``."""
    for one in (draft, target):
        if not (one / WEIGHTS).exists():
            raise SystemExit(
                f"ship: {one} has no {WEIGHTS}: weights in several files cannot be used"
            )
    weights = load_file(draft / WEIGHTS)
    shared = []
    with safe_open(target / WEIGHTS, framework="pt") as file:
        for name in sorted(weights.keys() & set(file.keys())):
            theirs = file.get_tensor(name)
            if theirs.shape == weights[name].shape and torch.equal(theirs, weights[name]):
                shared.append(name)
                del weights[name]
    for name in TOKENIZER:
        both = [
            (one / name).read_bytes() if (one / name).exists() else b"" for one in (draft, target)
        ]
        if both[0] != both[1]:
            raise SystemExit(f"ship: {name} differs from the target's: it would have to be stored")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "from_target": " ".join(shared)}
    save_file(weights, folder / WEIGHTS, metadata=metadata)
    for name in OWN_FILES:
        shutil.copyfile(draft / name, folder / name)
    size = (folder / WEIGHTS).stat().st_size / 1e6
    say(f"{size:.1f} MB in {folder}; from the target: {', '.join(shared) or 'nothing'}")


if __name__ == "__main__":
    typer.run(ship)
