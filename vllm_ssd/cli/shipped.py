"""The distilled draft that ships with the package, completed with what it shares with the target.

The embedding and the tokenizer are the target's and not stored twice: they are taken
from its folder when the draft's is made. ``examples/distill/ship.py`` does the reverse. Layers
stored in int8 are multiplied out where int8 is not known to be faster.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHIPPED = Path(__file__).parent / "smollm2_draft"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
SCALE = "_scale"
"""Ends the name of the scales of the int8 weights whose name comes before it."""
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


def int8_pays() -> bool:
    """Whether vLLM computes int8 layers faster here than others: on CPUs with AVX-512.

    With AVX2 alone its int8 products take several times as long as those in float32. Not measured
    on other devices.
    """
    import torch

    return torch.version.cuda is None and torch.cpu._is_avx512_supported()


def join(shipped: Path, target: Path, folder: Path, int8: bool = True) -> None:
    """Make a complete model folder of the shipped weights and the target's.

    Args:
        shipped: holds the weights that differ from the target's, configuration and card.
        target: the target's folder.
        folder: the draft's, to be made.
        int8: whether layers that are stored in int8 stay so, or become bfloat16.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    weights = load_file(shipped / WEIGHTS)
    with safe_open(shipped / WEIGHTS, framework="pt") as file:
        taken = (file.metadata() or {}).get("from_target", "").split()
    with safe_open(target / WEIGHTS, framework="pt") as file:
        weights |= {name: file.get_tensor(name) for name in taken}
    config = json.loads((shipped / CONFIG).read_text())
    if not int8 and config.pop("quantization_config", None):
        weights = multiplied_out(weights, torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    for source in shipped.iterdir():
        if source.is_file() and source.name not in (WEIGHTS, CONFIG):
            shutil.copyfile(source, folder / source.name)
    copy_tokenizer(target, folder)


def multiplied_out(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A model's weights by name in a float type, those in int8 times their scales."""
    return {
        name: (weight.float() * weights.get(name + SCALE, 1.0)).to(dtype)
        for name, weight in weights.items()
        if not name.endswith(SCALE)
    }


def copy_tokenizer(target: Path, folder: Path) -> None:
    """Give a draft's folder the files it has in common with the target."""
    for name in TOKENIZER:
        if (target / name).exists():
            shutil.copyfile(target / name, folder / name)
