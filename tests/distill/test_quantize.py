"""A draft in int8: what the tool computes is what vLLM computes, and it drafts."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.draft.model_process import ModelProcess
from tests.draft.test_head_rows import IDS, forward
from tests.draft.test_vllm_model import CANDIDATES, engine_args, text
from tests.tiny_models import HIDDEN, VOCABULARY, TinyModels

TOLERANCE = {"float32": 0.05, "bfloat16": 0.2}
"""Of logits, as a share of their spread: an activation may round the other way."""


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


NO_FLOAT32 = torch.cpu._is_amx_tile_supported()
"""There vLLM computes int8 layers in 16 bits only."""


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param("float32", marks=pytest.mark.skipif(NO_FLOAT32, reason="a CPU with AMX")),
        pytest.param("bfloat16", marks=() if NO_FLOAT32 else pytest.mark.slow),
    ],
)
def test_vllm_computes_a_stored_draft_as_the_tool_evaluates_it(
    quantize: Any, tiny_pair: TinyModels, int8_draft: Path, dtype: str
) -> None:
    reference = load(tiny_pair.draft)
    quantize.quantize_layers(reference)
    stored = load_file(int8_draft / quantize.WEIGHTS)
    reference.load_state_dict(stored, strict=True)  # embedding, head and norms in bfloat16
    arguments = engine_args(tiny_pair, enforce_eager=True) | {"dtype": dtype}
    arguments["model"] = str(int8_draft)
    texts = [text(length, seed=length) for length in (1, 20, 33)]
    with ModelProcess(arguments, CANDIDATES, VOCABULARY, IDS) as model:
        top = forward(model, texts)
    for tokens, best in zip(texts, top, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0, -1]
        among = logits[torch.from_numpy(IDS).long()]
        wanted = torch.topk(among, CANDIDATES).values
        tolerance = TOLERANCE[dtype] * float(among.std())
        torch.testing.assert_close(logits[best.tolist()], wanted, atol=tolerance, rtol=0)


def test_layers_are_stored_in_int8_and_all_else_as_it_was(
    quantize: Any, tiny_pair: TinyModels, int8_draft: Path
) -> None:
    before, after = (
        load_file(tiny_pair.draft / quantize.WEIGHTS),
        load_file(int8_draft / quantize.WEIGHTS),
    )
    layers = {name for name, weight in after.items() if weight.dtype == torch.int8}
    assert layers == {name for name in before if name.endswith("proj.weight")} != set()
    again = quantize.float_weights(int8_draft)
    assert again.keys() == before.keys()
    for name, weight in before.items():
        if name in layers:
            step = after[name + quantize.SCALE]
            assert step.dtype == torch.float32
            # Half a step, and what float32 adds to it.
            assert ((again[name] - weight).abs() <= 0.501 * step).all()
        else:
            assert torch.equal(again[name], weight.to(torch.bfloat16).float())
    for file in tiny_pair.draft.iterdir():
        assert (int8_draft / file.name).exists()


def test_a_layer_is_nearly_what_it_was_in_float(quantize: Any) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=False)
    inputs = torch.randn(2, 5, 64)
    inputs[0, 0] = 0.0
    outputs = quantize.Int8Linear(linear)(inputs)
    torch.testing.assert_close(outputs, linear(inputs), atol=0.03, rtol=0.0)
    assert outputs[0, 0].eq(0).all()


def test_a_layer_is_what_vllms_kernel_computes(quantize: Any) -> None:
    ops = importlib.import_module("vllm._custom_ops")
    torch.manual_seed(0)
    layer = quantize.Int8Linear(nn.Linear(576, 96, bias=False))
    inputs = torch.randn(33, 576)
    weight, scale = layer.weight.T, layer.weight_scale
    kernel = ops.create_onednn_scaled_mm(weight, scale, torch.float32, True, False, 32)
    rounded, scales, zero_points = ops.onednn_scaled_int8_quant(inputs)
    adjustment = weight.sum(0, keepdim=True, dtype=torch.float32) * scale.T
    outputs = torch.empty(33, 96)
    ops.onednn_scaled_mm(kernel, rounded, outputs, scales, zero_points, adjustment, None)
    torch.testing.assert_close(layer(inputs), outputs, atol=1e-5, rtol=1e-5)


def test_a_layer_with_a_bias_is_refused(quantize: Any, tiny_pair: TinyModels) -> None:
    model = load(tiny_pair.draft)
    model.model.layers[0].mlp.up_proj = nn.Linear(HIDDEN, 8, bias=True)
    with pytest.raises(ValueError, match=r"layer layers\.0\.mlp\.up_proj has a bias"):
        quantize.quantize_layers(model)
