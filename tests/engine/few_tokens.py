"""Random models of 24 tokens, whose texts of four tokens can all be enumerated."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from tests.engine.byte_models import of_bytes
from tests.tiny_models import BOS, EOS, NOISE, TinyModels, random_llama

TOKENS = 24
LETTERS = string.ascii_lowercase[: TOKENS - 3]
"""The tokens from 3 on."""


def few_token_models(folder: Path) -> TinyModels:
    """A random target, an unrelated draft, and the target with noise."""
    target = _random_llama(layers=2, seed=3)
    target.save_pretrained(folder / "target")
    _random_llama(layers=1, seed=4).save_pretrained(folder / "draft")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in target.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * weight.std() * NOISE * 5)
    target.save_pretrained(folder / "near")
    tokenizer = _letter_tokenizer()
    for name in ("target", "draft", "near"):
        tokenizer.save_pretrained(folder / name)
    return TinyModels(folder / "target", folder / "draft", folder / "near")


def _random_llama(layers: int, seed: int) -> Any:
    return random_llama(layers, seed, vocab_size=TOKENS, max_positions=128)


def _letter_tokenizer() -> Any:
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS}
    vocabulary |= {letter: 3 + i for i, letter in enumerate(LETTERS)}
    return of_bytes(vocabulary, [])
