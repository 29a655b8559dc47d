"""The draft's shape, written in one word, and its first weights, taken from the target.

``layers:0,1,2,-1`` keeps these layers of the target (-1 is the last) and its embedding, which stays
frozen: the draft starts near the target's representation, and only its layers are its own.

``narrow:256x4`` is a Llama of hidden size 256 and 4 layers. Its embedding is the target's,
projected on its 256 principal components (PCA), and is trained.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HEAD_SIZE = 64


class Shape(NamedTuple):
    """What ``--shape`` says: the layers to keep, or else a narrow model's size."""

    kept: tuple[int, ...]
    hidden: int
    layers: int


def parse_shape(word: str, target_layers: int) -> Shape:
    """Read a shape.

    Raises:
        ValueError: it cannot be read or does not fit a target of so many layers.
    """
    if found := re.fullmatch(r"layers:(-?\d+(?:,-?\d+)*)", word):
        kept = tuple(int(number) for number in found[1].split(","))
        for number in kept:
            if not -target_layers <= number < target_layers:
                raise ValueError(
                    f"--shape {word}: the target has layers 0 to {target_layers - 1}, not {number}"
                )
        return Shape(kept, 0, len(kept))
    if found := re.fullmatch(r"narrow:(\d+)x(\d+)", word):
        hidden, layers = int(found[1]), int(found[2])
        if not hidden or hidden % HEAD_SIZE or not layers:
            raise ValueError(
                f"--shape {word}: the hidden size needs to be a multiple of {HEAD_SIZE}"
            )
        return Shape((), hidden, layers)
    raise ValueError(
        f"--shape {word}: needs layers:<number>,<number>... or narrow:<hidden size>x<layers>"
    )


def build_draft(shape: Shape, target: Path) -> torch.nn.Module:
    """A draft in float32 whose output is tied to its embedding."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    if shape.kept:
        return _keep_layers(model, shape.kept)
    return _narrow(model, shape.hidden, shape.layers)


def _keep_layers(model: Any, kept: tuple[int, ...]) -> torch.nn.Module:
    model.model.layers = torch.nn.ModuleList(model.model.layers[number] for number in kept)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(kept)
    # Written by some versions of transformers, one entry a layer.
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(kept)]
    model.model.embed_tokens.weight.requires_grad_(False)
    return model


def _narrow(model: Any, hidden: int, layers: int) -> torch.nn.Module:
    heads = hidden // HEAD_SIZE
    wanted = LlamaConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=model.config.max_position_embeddings,
        rope_theta=getattr(model.config, "rope_theta", None)
        or model.config.rope_parameters["rope_theta"],
        rms_norm_eps=model.config.rms_norm_eps,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        tie_word_embeddings=True,
    )
    draft = LlamaForCausalLM(wanted)
    embedding = model.model.embed_tokens.weight.detach()
    _, _, components = torch.pca_lowrank(embedding, q=hidden, center=False)
    projected = embedding @ components
    # As small as a fresh embedding, or the tied head's first logits would be huge.
    projected *= 0.02 / projected.std()
    draft.model.embed_tokens.weight.data.copy_(projected)
    return draft


def num_trained(model: torch.nn.Module) -> int:
    """Parameters that are not the target's own."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
