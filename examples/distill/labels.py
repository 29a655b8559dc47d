"""The target's distribution at each token of its answers: what the draft learns to imitate.

vLLM returns it with the answers it generates (``generation.py``); ``label`` computes it for answers
that were made elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from progress import track
from texts import Text, batches
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

BEST = 20
"""Tokens kept of each distribution: on SmolLM2's answers they hold 97 % of it."""
SHARD = 256
"""Texts in a file: the most that is lost when labelling is cut off."""
BATCH_TOKENS = 4096


class Labels(NamedTuple):
    """The likeliest tokens of the target at each token of an answer, likeliest first."""

    tokens: np.ndarray
    """``[T, BEST]`` int32."""
    log_probs: np.ndarray
    """``[T, BEST]`` float16, natural logarithms, over the whole vocabulary."""


def label(target: Path, texts: list[Text], folder: Path) -> list[Labels]:
    """Labels for texts, read from ``folder`` where an earlier run left them."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(texts), SHARD)
    missing = [start for start in starts if not _shard(folder, start).exists()]
    if missing:
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        for start in track(missing, "labelling"):
            _label_shard(model, texts[start : start + SHARD], _shard(folder, start))
    return [labels for start in starts for labels in _read(_shard(folder, start))]


def save_labels(folder: Path, start: int, labels: list[Labels]) -> None:
    """Write the labels of some texts; ``start`` puts them in order among those of ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(_shard(folder, start), labels)


def read_labels(folder: Path) -> list[Labels]:
    """All labels of a folder, in order."""
    return [labels for path in sorted(folder.glob("labels-*.npz")) for labels in _read(path)]


def _shard(folder: Path, start: int) -> Path:
    return folder / f"labels-{start:07d}.npz"


@torch.inference_mode()
def _label_shard(model: torch.nn.Module, texts: list[Text], path: Path) -> None:
    lengths = np.array([len(text.p) + len(text.a) for text in texts])
    found: dict[int, Labels] = {}
    for group in batches(lengths, BATCH_TOKENS, seed=0):
        tokens = torch.zeros(len(group), int(lengths[group].max()), dtype=torch.long)
        for row, index in enumerate(group):
            text = texts[index]
            tokens[row, : lengths[index]] = torch.tensor(text.p + text.a)
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        for row, index in enumerate(group):
            text = texts[index]
            # The distribution of an answer's token is computed at the token before it.
            own = hidden[row, len(text.p) - 1 : lengths[index] - 1]
            log_probs = linear(own, model.lm_head.weight).log_softmax(-1)
            best = log_probs.topk(BEST)
            found[int(index)] = Labels(
                best.indices.to(torch.int32).numpy(), best.values.to(torch.float16).numpy()
            )
    _write(path, [found[index] for index in range(len(texts))])


def _write(path: Path, ordered: list[Labels]) -> None:
    scratch = path.with_suffix(".partial")
    with scratch.open("wb") as file:
        np.savez(
            file,
            ends=np.cumsum([len(labels.tokens) for labels in ordered]),
            tokens=np.concatenate([labels.tokens for labels in ordered]),
            log_probs=np.concatenate([labels.log_probs for labels in ordered]),
        )
    scratch.rename(path)


def _read(path: Path) -> list[Labels]:
    with np.load(path) as shard:
        ends = shard["ends"][:-1]
        return [
            Labels(tokens, log_probs)
            for tokens, log_probs in zip(
                np.split(shard["tokens"], ends), np.split(shard["log_probs"], ends), strict=True
            )
        ]
