"""The tiny models under a tokenizer that can write any text, for grammars and stop strings."""

from __future__ import annotations

import itertools
import string
from pathlib import Path
from typing import Any

from tests.tiny_models import BOS, EOS, VOCABULARY, TinyModels

WHOLE_LETTERS = 3 + 256
"""From this id on tokens are pairs of letters; those before are single bytes."""


def byte_models(models: TinyModels, folder: Path) -> TinyModels:
    """Copies (by link) of the models' weights with the byte tokenizer."""
    tokenizer = byte_tokenizer()
    for source in {models.target, models.draft, models.near}:
        copy = folder / source.name
        copy.mkdir()
        for file in source.iterdir():
            if "token" not in file.name:
                (copy / file.name).symlink_to(file)
        tokenizer.save_pretrained(copy)
    return TinyModels(*(folder / s.name for s in (models.target, models.draft, models.near)))


def byte_tokenizer() -> Any:
    """All bytes, then pairs of letters up to the models' vocabulary."""
    from tokenizers import pre_tokenizers

    pairs = (a + b for a, b in itertools.product(string.ascii_lowercase, repeat=2))
    pieces = itertools.chain(sorted(pre_tokenizers.ByteLevel.alphabet()), pairs)
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS}
    vocabulary |= {p: i for i, p in zip(range(3, VOCABULARY), pieces, strict=False)}
    merges = [(p[0], p[1]) for p in vocabulary if len(p) == 2]
    return of_bytes(vocabulary, merges)


def of_bytes(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """A tokenizer of bytes, some pairs of which are tokens of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
