"""How much of a shared device the draft takes, from vLLM's specs and the draft's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from vllm.config import ModelConfig, ParallelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from tests.tiny_models import HIDDEN, VOCABULARY, TinyModels
from vllm_ssd.target import memory
from vllm_ssd.target.checkpoint import Tensor, checkpoint_tensors
from vllm_ssd.target.memory import Shape

TOKENS = 1024
LLAMA = Shape(16, 2048, 32, 8, 64, 8192, 0, 8192, 128256, tied=True)
"""Llama-3.2-1B."""


@pytest.fixture(scope="module")
def engine(tiny_pair: TinyModels) -> Any:
    """A target's configuration of 1,024 tokens."""
    return EngineArgs(
        model=str(tiny_pair.target), dtype="bfloat16", max_model_len=TOKENS
    ).create_engine_config()


def full(heads: int, dtype: torch.dtype = torch.bfloat16, **values: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=16, num_kv_heads=heads, head_size=128, dtype=dtype, **values
    )


# ---- the target's KV cache


def test_plain_attention_of_the_target_counts_keys_and_values(engine: Any) -> None:
    assert memory.target_kv_bytes_per_token([full(8)] * 4, engine) == 4 * 2 * 8 * 128 * 2


def test_tensor_parallelism_leaves_this_device_its_heads(
    engine: Any, tiny_pair: TinyModels
) -> None:
    model = ModelConfig(model=str(tiny_pair.target))
    one, two = (
        full(model.get_num_kv_heads(ParallelConfig(tensor_parallel_size=size))) for size in (1, 2)
    )
    assert memory.target_kv_bytes_per_token([one], engine) == 2 * 2 * 128 * 2
    assert memory.target_kv_bytes_per_token([two], engine) == 1 * 2 * 128 * 2


def test_a_cache_in_eight_bits_is_half_as_large(engine: Any) -> None:
    spec = full(8, torch.float8_e4m3fn, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
    assert memory.target_kv_bytes_per_token([spec], engine) == 2 * 8 * 128


def test_latent_attention_counts_its_latents(engine: Any) -> None:
    # DeepSeek: 512 latent and 64 rotary numbers a token and layer, for all heads together.
    spec = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    assert memory.target_kv_bytes_per_token([spec] * 27, engine) == 27 * 576 * 2


def test_a_window_counts_for_no_more_than_it_holds(engine: Any) -> None:
    window = SlidingWindowSpec(
        block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, sliding_window=128
    )
    engine.scheduler_config.max_num_batched_tokens = 128
    mixed = memory.target_kv_bytes_per_token([full(8), window, window, window], engine)
    assert 2 * 8 * 128 * 2 < mixed < 2 * 2 * 2 * 8 * 128 * 2


# ---- the draft's


def test_the_drafts_cache_is_that_of_vllms_own_spec(tiny_pair: TinyModels) -> None:
    draft = ModelConfig(model=str(tiny_pair.draft), dtype="float32")
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    assert memory.draft_kv_bytes_per_token(draft) == 2 * spec.page_size_bytes // 16


def test_a_checkpoint_that_quantises_its_cache_is_followed(tiny_pair: TinyModels) -> None:
    draft = ModelConfig(model=str(tiny_pair.draft), dtype="float32")
    plain = memory.draft_kv_bytes_per_token(draft)
    draft.hf_config.quantization_config = {
        "quant_method": "modelopt",
        "kv_cache_quant_algo": "FP8",
    }
    assert memory.draft_kv_bytes_per_token(draft) == plain // 4


def test_by_default_both_hold_the_same_number_of_tokens() -> None:
    size = memory.kv_cache_bytes(1_114, 100, 8.0, 2, 10_000, 7, target_size_is_given=False)
    assert size == 2 * (100 + 7)
    assert 1_114 - 100 - size == 8 * 100


@pytest.mark.parametrize("gib", [4, 8, 20])
def test_forks_leave_the_target_most_of_a_small_device(gib: int) -> None:
    # An 8B target and a 0.6B draft in bfloat16; 1,024 rows of two blocks of 16.
    target, draft, forks = 144 << 10, 112 << 10, 2 * 1024 * 16
    size = memory.kv_cache_bytes(gib << 30, 2 << 30, target, draft, 1 << 30, forks, False)
    left = (gib << 30) - (2 << 30)
    # Without forks the target would have target / (target + draft) of it.
    assert left - size >= 0.85 * left * target / (target + draft)
    assert size >= 0.99 * left * draft / (target + draft)


def test_beside_a_target_of_given_size_the_drafts_comes_on_top() -> None:
    assert memory.kv_cache_bytes(800, 100, 8.0, 2, 10_000, 7, True) == 2 * (100 + 7)
    # Forks own no more than the texts.
    assert memory.kv_cache_bytes(800, 100, 8.0, 2, 10_000, 500, True) == 2 * (100 + 100)


def test_the_draft_takes_no_more_than_its_requests_can_use() -> None:
    assert memory.kv_cache_bytes(1 << 30, 0, 8.0, 2, 50, 7, False) == 2 * (50 + 7)
    # Attention-free: the target has no cache to compare with.
    assert memory.kv_cache_bytes(0, 0, 0.0, 2, 50, 7, True) == 2 * (50 + 7)


def test_a_cache_that_holds_no_whole_text_names_the_size_that_does() -> None:
    # Three blocks for the text, and one that vLLM keeps to itself.
    memory.check_kv_cache(4 * 64, 4, 33, 16)
    with pytest.raises(ValueError, match=r"holds 32 tokens, fewer than .* 33; raise it to 256"):
        memory.check_kv_cache(4 * 63, 4, 33, 16)


def test_the_longest_text_fills_whole_blocks() -> None:
    assert memory.longest_text(4 * 63, 4, 16) == 32
    assert memory.longest_text(4 * 15, 4, 16) == 0


# ---- the weights


def test_weights_are_counted_in_the_type_they_are_loaded_in() -> None:
    tensors = {
        "a": Tensor("F32", 100, 400),
        "b": Tensor("BF16", 10, 20),
        "packed": Tensor("I32", 5, 20),
    }
    assert memory.weight_bytes(tensors, LLAMA, 2, None, on_cpu=False) == 200 + 20 + 20


def test_a_head_that_is_the_embedding_is_not_loaded_twice() -> None:
    tensors = {"embed": Tensor("BF16", 10, 20), "lm_head.weight": Tensor("BF16", 10, 20)}
    tied, untied = LLAMA, LLAMA._replace(tied=False)
    assert memory.weight_bytes(tensors, tied, 2, None, on_cpu=False) == 20
    assert memory.weight_bytes(tensors, untied, 2, None, on_cpu=False) == 40


def test_a_selected_head_takes_the_whole_ones_place_unless_that_is_the_embedding() -> None:
    row = 2 * LLAMA.hidden
    for tied, more in ((True, 1000 * row), (False, (1000 - LLAMA.vocabulary) * row)):
        shape = LLAMA._replace(tied=tied)
        whole = memory.weight_bytes({}, shape, 2, None, on_cpu=False)
        assert memory.weight_bytes({}, shape, 2, 1000, on_cpu=False) == whole + more


def test_without_a_checkpoint_the_parameters_are_counted() -> None:
    assert LLAMA.parameters == pytest.approx(1_235_814_400, rel=0.001)
    mixtral = Shape(32, 4096, 32, 8, 128, 14336, 8, 14336, 32000, tied=False)
    # With a dense part beside the experts, which other mixtures have.
    assert mixtral.parameters - 32 * 3 * 4096 * 14336 == pytest.approx(46.7e9, rel=0.01)


def test_the_shape_of_a_model_gives_its_number_of_parameters(tiny_pair: TinyModels) -> None:
    draft = ModelConfig(model=str(tiny_pair.draft), dtype="float32")
    tensors = checkpoint_tensors(str(tiny_pair.draft), None, None)
    norms = 5 * HIDDEN
    assert memory.shape_of(draft).parameters == sum(t.elements for t in tensors.values()) - norms


def test_logits_of_many_rows_over_a_large_vocabulary_count() -> None:
    needed = memory.working_bytes(1024, 1024 + 2048, LLAMA.vocabulary, LLAMA, 2)
    assert needed > 1024 * LLAMA.vocabulary * (2 + 4) > 512 << 20


# ---- the checkpoint


def save(file: Path, **arrays: Any) -> None:
    save_file({name: np.zeros(shape, np.float32) for name, shape in arrays.items()}, file)


def test_a_checkpoint_is_read_from_its_headers(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", a=(2, 3), b=(4,))
    assert checkpoint_tensors(str(tmp_path), None, None) == {
        "a": Tensor("F32", 6, 24),
        "b": Tensor("F32", 4, 16),
    }


def test_of_two_copies_of_the_weights_the_one_that_is_loaded_counts(tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", a=(2,))
    save(tmp_path / "two.safetensors", b=(2,))
    save(tmp_path / "consolidated.safetensors", c=(2,))
    assert checkpoint_tensors(str(tmp_path), None, None).keys() == {"a", "b"}
    index = {"weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_tensors(str(tmp_path), None, None).keys() == {"a"}


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{]"])
def test_a_broken_checkpoint_is_left_to_the_draft_to_report(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert checkpoint_tensors(str(tmp_path), None, None) == {}


def test_of_a_hub_name_only_downloaded_files_are_read(tmp_path: Path) -> None:
    assert checkpoint_tensors("nobody/nothing", None, str(tmp_path)) == {}
    snapshot = tmp_path / "models--nobody--draft" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = tmp_path / "models--nobody--draft" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    save(snapshot / "model.safetensors", a=(VOCABULARY,))
    found = checkpoint_tensors("nobody/draft", None, str(tmp_path))
    assert found == {"a": Tensor("F32", VOCABULARY, 4 * VOCABULARY)}
