"""The layout of the draft's KV cache, and copies of its blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_ssd.draft.kv_cache import copy_kv_blocks, prefer_blocks_outermost

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 3, 8, 2, 4, 6


def test_blocks_outermost_come_first_in_the_attentions_own_order() -> None:
    default = ["LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "LHBNC"]  # vLLM's
    assert prefer_blocks_outermost(default)[0] == "BLNHC"
    assert sorted(prefer_blocks_outermost(default)) == sorted(default)
    blackwell = ["LBHNC", "BLHNC"]  # of FlashInfer
    assert prefer_blocks_outermost(blackwell) == ["BLHNC", "LBHNC"]
    cpu = ["LBHNC"]
    assert prefer_blocks_outermost(cpu) == cpu


def test_the_names_say_what_vllm_says_of_its_layouts() -> None:
    from vllm.v1.kv_cache_layout import KVCacheLayout

    names = [layout.name for layout in KVCacheLayout]
    best = prefer_blocks_outermost(names)
    outermost = {layout.name for layout in KVCacheLayout if layout.is_block_outermost}
    assert set(best[: len(outermost)]) == outermost


def layers(blocks_outermost: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One allocation and its views by layer, as vLLM makes them."""
    sizes = (LAYERS, BLOCKS, HEADS, TOKENS, CONTENT)
    if blocks_outermost:
        cache = torch.randn(BLOCKS, LAYERS, *sizes[2:])
        return cache, list(cache.unbind(1))
    cache = torch.randn(sizes)
    return cache, list(cache.unbind(0))


@pytest.mark.parametrize("blocks_outermost", [True, False])
def test_blocks_are_copied_in_every_layer(blocks_outermost: bool) -> None:
    _, views = layers(blocks_outermost)
    before = [view.clone() for view in views]
    copy_kv_blocks(views, BLOCKS, np.array([1, 1, 6], np.int32), np.array([3, 4, 0], np.int32))
    for view, old in zip(views, before, strict=True):
        torch.testing.assert_close(view[[3, 4, 0]], old[[1, 1, 6]])
        torch.testing.assert_close(view[[1, 2, 5, 6, 7]], old[[1, 2, 5, 6, 7]])


def test_blocks_outermost_are_copied_in_all_layers_by_one_operation() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        writes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.writes += function.overloadpacket is torch.ops.aten.index_put_
            return function(*args, **(kwargs or {}))

    found = []
    for blocks_outermost in (True, False):
        with Counting() as counting:
            copy_kv_blocks(
                layers(blocks_outermost)[1],
                BLOCKS,
                np.array([1, 2], np.int32),
                np.array([3, 4], np.int32),
            )
        found.append(counting.writes)
    assert found == [1, LAYERS]
