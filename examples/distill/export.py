"""The draft as a model folder that vLLM and transformers load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json")
TOKENIZER += ("merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json")
VOCABULARY = "draft_vocab.txt"


def save_draft(model: Any, frequent: list[int], target: Path, folder: Path) -> None:
    """Write the draft in bfloat16 with the target's tokenizer and its own frequency file.

    Args:
        model: the trained draft.
        frequent: token ids its head learned, most frequent first.
        target: folder of the target.
        folder: where to write.
    """
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER:
        if (target / name).exists():
            shutil.copyfile(target / name, folder / name)
    lines = ["# Token ids the draft's head learned, most frequent first.", *map(str, frequent)]
    (folder / VOCABULARY).write_text("\n".join(lines) + "\n")
