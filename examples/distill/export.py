"""The draft as a model folder that vLLM and transformers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize import save_model

from vllm_ssd.cli.shipped import copy_tokenizer
from vllm_ssd.draft_vocab import FILE


def save_draft(model: Any, frequent: list[int], target: Path, folder: Path) -> None:
    """Write the draft with the target's tokenizer and its own frequency file.

    Args:
        model: the trained draft.
        frequent: token ids its head learned, most frequent first.
        target: folder of the target.
        folder: where to write.
    """
    save_model(model, folder)
    copy_tokenizer(target, folder)
    lines = ["# Token ids the draft's head learned, most frequent first.", *map(str, frequent)]
    (folder / FILE).write_text("\n".join(lines) + "\n")
