"""A target that costs many times its draft and writes the same text: speculation gains by itself.

Real servers decide by measured times whether to speculate, and for the tiny models it does not pay.
"""

from __future__ import annotations

from pathlib import Path

from tests.tiny_models import TinyModels

LAYERS = 40


def with_deep_target(models: TinyModels, folder: Path) -> TinyModels:
    """The models with a deep target in the folder, whose ``near`` is the target of before.

    It has :data:`LAYERS` layers; those behind the first ones add exactly zero.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = AutoModelForCausalLM.from_pretrained(models.target, dtype=torch.float32)
    layers = target.model.layers
    with torch.no_grad():
        while len(layers) < LAYERS:
            layer = type(layers[0])(target.config, len(layers))
            layer.load_state_dict(layers[-1].state_dict())
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layers.append(layer)
    target.config.num_hidden_layers = LAYERS
    target.save_pretrained(folder / "deep")
    AutoTokenizer.from_pretrained(models.target).save_pretrained(folder / "deep")
    return TinyModels(folder / "deep", models.draft, near=models.target)
