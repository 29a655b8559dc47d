"""A head of which some rows are selected gives what the whole head gives for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.draft.model_process import ModelProcess
from tests.draft.test_vllm_model import BLOCK_SIZE, CANDIDATES, TOLERANCE, engine_args, text
from tests.tiny_models import HIDDEN, VOCABULARY, TinyModels
from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.draft.head import select_head_rows
from vllm_ssd.draft.model import BlockChanges, Sequences

IDS = np.random.default_rng(5).permutation(VOCABULARY)[:75].astype(np.int32)
"""Unordered, and not a round number of rows."""


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "tied",
    [pytest.param(False, marks=pytest.mark.slow, id="untied"), pytest.param(True, id="tied")],
)
def test_candidates_are_the_best_of_the_selected_tokens(
    tiny_pair: TinyModels, tmp_path: Path, tied: bool
) -> None:
    reference = load(tiny_pair.draft)
    if tied:
        reference.config.tie_word_embeddings = True
        reference.lm_head.weight = reference.model.embed_tokens.weight
        reference.save_pretrained(tmp_path)
        reference = load(tmp_path)
    arguments = engine_args(tiny_pair, enforce_eager=True)
    arguments["model"] = str(tmp_path if tied else tiny_pair.draft)
    texts = [text(length, seed=length) for length in (1, 20, 33)]
    # The model can still read tokens that are not among them.
    texts[1][-1] = next(i for i in range(3, VOCABULARY) if i not in IDS)
    with ModelProcess(arguments, CANDIDATES, VOCABULARY, IDS) as model:
        top = forward(model, texts)
    for tokens, best in zip(texts, top, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0, -1]
        wanted = torch.topk(logits[torch.from_numpy(IDS).long()], CANDIDATES).values
        torch.testing.assert_close(logits[best.tolist()], wanted, atol=TOLERANCE, rtol=TOLERANCE)
        assert set(best.tolist()) <= set(IDS.tolist())
        assert len(set(best.tolist())) == CANDIDATES


def forward(model: ModelProcess, texts: list[list[int]]) -> Int32Array:
    lengths = np.array([len(tokens) for tokens in texts], np.int32)
    blocks = 1 + np.arange(2 * len(texts), dtype=np.int32).reshape(-1, 64 // BLOCK_SIZE)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    tokens = np.array([token for tokens in texts for token in tokens], np.int32)
    rows = np.arange(len(texts), dtype=np.int32)
    changes = BlockChanges.of_tables(rows, blocks)
    return model.forward(changes, Sequences(rows, lengths, tokens, positions)).tokens


# ---- the ways in which vLLM's models make logits


class Model(nn.Module):
    """The end of a model, of vLLM's own layers: an embedding, a head, a logits processor.

    Args:
        tied: the embedding is the head.
        bias: the head has a bias.
        scale: what the logits are multiplied with.
        soft_cap: what they are capped at.
    """

    def __init__(
        self, tied: bool = False, bias: bool = False, scale: float = 1.0, soft_cap: float = 0.0
    ) -> None:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        super().__init__()
        self.embed = VocabParallelEmbedding(VOCABULARY, HIDDEN, disable_tp=True)
        self.head: Any = self.embed
        if not tied:
            self.head = ParallelLMHead(VOCABULARY, HIDDEN, bias=bias, disable_tp=True)
        self.processor = LogitsProcessor(VOCABULARY, scale=scale, soft_cap=soft_cap or None)
        torch.manual_seed(0)
        for weight in self.parameters():
            weight.data.normal_()
        for layer in {self.embed, self.head}:
            layer.quant_method.process_weights_after_loading(layer)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[n, VOCABULARY]``."""
        if getattr(self.head, "bias", None) is None:
            return self.processor(self.head, hidden)
        return self.processor(self.head, hidden, self.head.bias)


class Masked(Model):
    """Forbids some tokens."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().compute_logits(hidden)
        logits[:, 10:20] = -1e9
        return logits


class Mapped(Model):
    """Its logits are for a larger vocabulary than its head's."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().compute_logits(hidden)
        whole = logits.new_full((len(logits), 2 * VOCABULARY), float("-inf"))
        whole[:, torch.arange(VOCABULARY) * 2] = logits
        return whole


class Twice(Model):
    """Has two heads."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().compute_logits(hidden) + self.processor(self.embed, hidden)


@pytest.fixture(scope="module")
def config(tiny_pair: TinyModels) -> Iterator[Any]:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    engine = EngineArgs(**engine_args(tiny_pair, enforce_eager=True)).create_engine_config()
    with set_current_vllm_config(engine):
        yield engine


@pytest.mark.parametrize(
    "arguments",
    [{"tied": True}, {"tied": False}, {"bias": True}, {"scale": 0.25, "soft_cap": 2.0}],
    ids=lambda arguments: " ".join(arguments),
)
def test_bias_scale_and_cap_stay_and_the_embedding_too(
    config: Any, arguments: dict[str, Any]
) -> None:
    model, ids = Model(**arguments), torch.from_numpy(IDS)
    hidden = torch.randn(5, HIDDEN)
    embedded = model.embed.weight.clone()
    expected = model.compute_logits(hidden)[:, ids.long()]
    select_head_rows(model, config, ids)
    torch.testing.assert_close(model.compute_logits(hidden)[:, : len(ids)], expected)
    torch.testing.assert_close(model.embed.weight.data, embedded.data)


def test_the_old_heads_memory_is_freed(config: Any) -> None:
    model = Model()
    select_head_rows(model, config, torch.from_numpy(IDS))
    sizes = {tuple(weight.shape) for weight in model.head.parameters()}
    assert sizes == {(128, HIDDEN)}  # padded as vLLM pads its heads
    assert not hasattr(model.head, "cpu_linear")


@pytest.mark.parametrize("kind", [Masked, Mapped, Twice])
def test_logits_that_are_not_just_a_heads_are_refused(config: Any, kind: type[Model]) -> None:
    with pytest.raises(ValueError, match=r"^ssd: option 'draft_vocab': .* set it to 0$"):
        select_head_rows(kind(), config, torch.from_numpy(IDS))


def test_a_head_of_another_width_is_refused(config: Any) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    model = Model()
    model.head = ParallelLMHead(VOCABULARY, HIDDEN // 2, disable_tp=True)
    with pytest.raises(ValueError, match=r"another width than its layers, .* set it to 0$"):
        select_head_rows(model, config, torch.from_numpy(IDS))


def test_a_quantised_head_is_refused(config: Any) -> None:
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    class Packed(QuantizeMethodBase):
        def create_weights(self, layer: nn.Module, *sizes: Any, **others: Any) -> None:
            layer.packed = torch.zeros(HIDDEN, VOCABULARY)

        def apply(self, layer: nn.Module, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
            return x @ layer.packed

    model = Model()
    model.head.quant_method = Packed()
    model.head.quant_method.create_weights(model.head)
    with pytest.raises(ValueError, match=r"head is quantised or packed \(Packed\).* to 0$"):
        select_head_rows(model, config, torch.from_numpy(IDS))
