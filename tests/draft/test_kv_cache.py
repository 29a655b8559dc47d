"""The layout of the draft's KV cache, and copies of its blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny_models import TinyModels
from vllm_ssd.draft.kv_cache import copy_kv_blocks, plan_kv_cache, prefer_blocks_outermost

LAYERS, BLOCKS = 3, 8


def test_blocks_outermost_come_first_in_the_attentions_own_order() -> None:
    default = ["LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "LHBNC"]  # vLLM's
    assert prefer_blocks_outermost(default)[0] == "BLNHC"
    assert sorted(prefer_blocks_outermost(default)) == sorted(default)
    blackwell = ["LBHNC", "BLHNC"]  # FlashInfer's
    assert prefer_blocks_outermost(blackwell) == ["BLHNC", "LBHNC"]
    cpu = ["LBHNC"]
    assert prefer_blocks_outermost(cpu) == cpu


def test_the_names_say_what_vllm_says_of_its_layouts() -> None:
    from vllm.v1.kv_cache_layout import KVCacheLayout

    names = [layout.name for layout in KVCacheLayout]
    best = prefer_blocks_outermost(names)
    outermost = {layout.name for layout in KVCacheLayout if layout.is_block_outermost}
    assert set(best[: len(outermost)]) == outermost


def allocated(
    tiny: TinyModels, layout: str, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """The caches of all layers, planned and allocated by vLLM in this layout."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    config = EngineArgs(
        model=str(tiny.draft), dtype="float32", max_model_len=64, skip_tokenizer_init=True
    ).create_engine_config()
    config.cache_config.kv_cache_layout = layout
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=16, dtype=dtype)
    specs = {f"model.layers.{i}.self_attn.attn": spec for i in range(LAYERS)}
    register_all_kvcache_specs(config)
    memory = LAYERS * BLOCKS * spec.page_size_bytes
    (planned,) = plan_kv_cache(config, specs, memory)
    assert planned.num_blocks == BLOCKS
    caches = allocate_kv_cache(planned, torch.device("cpu"), KVCacheLayout[layout])
    for cache in caches.values():
        cache.normal_()
    return list(caches.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["BLNHC", "LBHNC"])
def test_blocks_are_copied_in_every_layer(
    tiny_pair: TinyModels, layout: str, dtype: torch.dtype
) -> None:
    caches = allocated(tiny_pair, layout, dtype)
    before = [cache.clone() for cache in caches]
    copy_kv_blocks(caches, BLOCKS, np.array([1, 1, 6], np.int32), np.array([3, 4, 0], np.int32))
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[[3, 4, 0]], old[[1, 1, 6]])
        assert torch.equal(cache[[1, 2, 5, 6, 7]], old[[1, 2, 5, 6, 7]])


class Writes(TorchDispatchMode):
    """Counts the operations that write by index."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += function.overloadpacket is torch.ops.aten.index_put_
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("layout", "operations"),
    [
        pytest.param("BLNHC", 1, id="one for all layers if blocks are outermost"),
        pytest.param("LBHNC", 0, id="none if numpy can do it"),
    ],
)
def test_blocks_are_copied_by_few_operations_of_torch(
    tiny_pair: TinyModels, layout: str, operations: int
) -> None:
    caches = allocated(tiny_pair, layout)
    with Writes() as writes:
        copy_kv_blocks(caches, BLOCKS, np.array([1, 2], np.int32), np.array([3, 4], np.int32))
    assert writes.count == operations
