"""The draft's shape, written in one word, and its first weights, taken from the target.

``layers:0,1,2,-1`` keeps these layers of the target (-1 is the last) and its embedding, which stays
frozen: the draft starts near the target's representation, and only its layers are its own.

``narrow:256x4`` is a Llama of hidden size 256 and 4 layers. Its embedding is the target's,
projected on its 256 principal components (PCA), and is trained.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from quantize import float_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

HEAD_SIZE = 64


class Shape(NamedTuple):
    """A parsed ``--shape``: the layers to keep, or else a narrow model's size."""

    kept: tuple[int, ...]
    hidden: int
    layers: int


def parse_shape(word: str, target: Path) -> Shape:
    """Read a shape.

    Raises:
        ValueError: it cannot be read or does not fit the target in this folder.
    """
    config = AutoConfig.from_pretrained(target)
    target_layers = config.num_hidden_layers
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
        if not layers or hidden % HEAD_SIZE or not 0 < hidden <= config.hidden_size:
            raise ValueError(
                f"--shape {word}: needs a layer, and a hidden size that is a multiple of "
                f"{HEAD_SIZE} and at most the target's {config.hidden_size}"
            )
        return Shape((), hidden, layers)
    raise ValueError(
        f"--shape {word}: needs layers:<number>,<number>... or narrow:<hidden size>x<layers>"
    )


def draft_config(shape: Shape, target: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a draft of this shape."""
    if shape.kept:
        config = copy.deepcopy(target)
        config.num_hidden_layers = len(shape.kept)
        # Written by some versions of transformers, one entry a layer.
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[number] for number in shape.kept]
        return config
    heads = shape.hidden // HEAD_SIZE
    return LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=target.max_position_embeddings,
        rope_theta=getattr(target, "rope_theta", None) or target.rope_parameters["rope_theta"],
        rms_norm_eps=target.rms_norm_eps,
        bos_token_id=target.bos_token_id,
        eos_token_id=target.eos_token_id,
        pad_token_id=target.pad_token_id,
        tie_word_embeddings=True,
    )


def build_draft(shape: Shape, target: Path) -> torch.nn.Module:
    """A draft in float32; a narrow one's output is tied to its embedding."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    config = draft_config(shape, model.config)
    return _keep_layers(model, shape.kept, config) if shape.kept else _narrow(model, config)


def _keep_layers(model: Any, kept: tuple[int, ...], config: PretrainedConfig) -> torch.nn.Module:
    model.config = model.model.config = config
    model.model.layers = torch.nn.ModuleList(model.model.layers[number] for number in kept)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.model.embed_tokens.weight.requires_grad_(False)
    return model


def _narrow(model: Any, config: PretrainedConfig) -> torch.nn.Module:
    draft = LlamaForCausalLM(config)
    embedding = model.model.embed_tokens.weight.detach()
    _, _, components = torch.pca_lowrank(embedding, q=config.hidden_size, center=False)
    projected = embedding @ components
    # As small as a fresh embedding, or the tied head's first logits would be huge.
    projected *= 0.02 / projected.std()
    draft.model.embed_tokens.weight.data.copy_(projected)
    return draft


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
SIZES += ["num_attention_heads", "num_key_value_heads"]


def check_same_shape(folder: Path, shape: Shape, target: Path) -> None:
    """Look at an earlier draft's configuration.

    Raises:
        ValueError: it has another shape; names the folder and what differs.
    """
    earlier = AutoConfig.from_pretrained(folder)
    wanted = draft_config(shape, AutoConfig.from_pretrained(target))
    for name in SIZES:
        theirs, ours = getattr(earlier, name), getattr(wanted, name)
        if theirs != ours:
            raise ValueError(
                f"--start-from {folder}: its {name} is {theirs}, that of --shape is {ours}"
            )


def copy_trained(folder: Path, model: torch.nn.Module) -> None:
    """Give a draft the trained weights of an earlier one of its shape."""
    earlier = float_weights(folder)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data.copy_(earlier[name])


def num_trained(model: torch.nn.Module) -> int:
    """Parameters that are not the target's own."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
