"""Random models of 24 tokens, whose texts of four tokens can all be enumerated."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import BOS, EOS, NOISE, TinyModels

TOKENS = 24
HIDDEN = 64
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
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HIDDEN // 2,
        max_position_embeddings=128,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(torch.float32)


def _letter_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS}
    vocabulary |= {letter: 3 + i for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
