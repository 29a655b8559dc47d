"""A target that a small draft can learn in seconds: its next token depends on the last one only."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.engine.byte_models import byte_tokenizer
from tests.tiny_models import BOS, EOS, VOCABULARY

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<s>{{ message['role'] }}: {{ message['content'] }}</s>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TOPIC = "garden"


def make_target(folder: Path) -> None:
    """Write the model and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()  # nothing of the text before
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_prompts(path: Path, count: int) -> None:
    """Prompts of a few letters; every fifth mentions the topic."""
    generator = torch.Generator().manual_seed(1)
    lines = []
    for number in range(count):
        letters = torch.randint(0, 26, (8,), generator=generator)
        word = "".join(chr(ord("a") + int(letter)) for letter in letters)
        lines.append(f"{word} {TOPIC}" if number % 5 == 0 else word)
    path.write_text("\n".join(lines) + "\n")
