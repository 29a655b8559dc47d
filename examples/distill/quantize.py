"""int8 weights and activations (W8A8), computed and stored as vLLM's kernels expect them.

``quantize.py DRAFT OUT`` does it to a draft that exists.

Each row of a layer's weights has a scale of its own, and so has each token of its input, found when
it is computed. The embedding, the head and the norms are left alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from vllm_ssd.cli.shipped import CONFIG, SCALE, WEIGHTS, multiplied_out

_LARGEST = 127
_SMALLEST_SCALE = 1e-12
"""Of a row or a token of zeros."""


class Int8Linear(nn.Module):
    """A linear layer as vLLM computes it in int8.

    Args:
        linear: the layer in float, without a bias.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize(linear.weight.detach().float())
        self.weight = nn.Buffer(weight)
        """``[out, in]`` int8."""
        self.weight_scale = nn.Buffer(scale)
        """``[out, 1]`` float32."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., out]`` of ``[..., in]``, in the type of the input."""
        rounded, scale = quantize(inputs.float().flatten(0, -2))
        products = torch._int_mm(rounded, self.weight.T)
        outputs = products * scale * self.weight_scale.T
        return outputs.to(inputs.dtype).unflatten(0, inputs.shape[:-1])


def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in int8, with the scale of each.

    Args:
        rows: ``[n, width]`` float32.

    Returns:
        ``[n, width]`` int8 and ``[n, 1]`` float32; their product is about ``rows``.
    """
    scale = (rows.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return (rows / scale).round().to(torch.int8), scale


def quantize_layers(model: Any) -> None:
    """Replace the linear layers of a causal language model's body, and note it in its config.

    Raises:
        ValueError: a layer has a bias.
    """
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            if module.bias is not None:
                raise ValueError(f"--quantize int8: layer {name} has a bias")
            model.model.set_submodule(name, Int8Linear(module))
    model.config.quantization_config = QUANTIZATION


def save_model(model: Any, folder: Path) -> None:
    """Write a draft's weights and configuration: what is not in int8 in bfloat16."""
    scales = {name: value for name, value in model.state_dict().items() if name.endswith(SCALE)}
    model.to(torch.bfloat16)
    model.save_pretrained(folder, state_dict=model.state_dict() | scales)


def float_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a draft's folder in float32, those in int8 multiplied out."""
    return multiplied_out(load_file(folder / WEIGHTS), torch.float32)


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "layers": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}
"""``quantization_config`` of the model's configuration."""


def main(draft: Path, out: Path) -> None:
    """Write a draft's folder again with its layers in int8; its card stays as it is."""
    model = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32)
    try:
        quantize_layers(model)
    except ValueError as error:
        raise SystemExit(f"quantize: {error}") from None
    save_model(model, out)
    for file in draft.iterdir():
        if file.is_file() and file.name not in (WEIGHTS, CONFIG):
            shutil.copyfile(file, out / file.name)


if __name__ == "__main__":
    typer.run(main)
