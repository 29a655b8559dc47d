"""The distilled draft that ships with the package, completed with what it shares with the target.

The embedding and the tokenizer are the target's and not stored twice: they are taken
from its folder when the draft's is made. ``examples/distill/ship.py`` does the reverse.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

SHIPPED = Path(__file__).parent / "smollm2_draft"
WEIGHTS = "model.safetensors"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
"""What a draft has in common with its target besides weights, as far as the target has it."""


def version(shipped: Path) -> str:
    """A name for the shipped files, by their content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in shipped.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def join(shipped: Path, target: Path, folder: Path) -> None:
    """Make a complete model folder of the shipped weights and the target's.

    Args:
        shipped: holds the weights that differ from the target's, configuration and card.
        target: the target's folder.
        folder: the draft's, to be made.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    weights = load_file(shipped / WEIGHTS)
    with safe_open(shipped / WEIGHTS, framework="pt") as file:
        taken = (file.metadata() or {}).get("from_target", "").split()
    with safe_open(target / WEIGHTS, framework="pt") as file:
        weights |= {name: file.get_tensor(name) for name in taken}
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    for source in shipped.iterdir():
        if source.is_file() and source.name != WEIGHTS:
            shutil.copyfile(source, folder / source.name)
    copy_tokenizer(target, folder)


def copy_tokenizer(target: Path, folder: Path) -> None:
    """Give a draft's folder the files it has in common with the target."""
    for name in TOKENIZER:
        if (target / name).exists():
            shutil.copyfile(target / name, folder / name)
