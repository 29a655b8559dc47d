"""The draft's KV cache: allocated as vLLM's engine does, in a layout that is quick to copy."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_ssd.core.arrays import Int32Array

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerWrapperBase


def prefer_blocks_outermost(layouts: Sequence[str]) -> list[str]:
    """Order KV cache layouts so that a block can be copied in all layers at once, if in any.

    vLLM names a layout by its dimensions, outermost first: L layers, B blocks, H heads, N tokens, C
    content. Its copy takes one operation if blocks are outermost, else one for each layer.

    Args:
        layouts: those the attention supports, most preferred first.

    Returns:
        The same, blocks outermost first; otherwise the order stays.
    """
    return sorted(layouts, key=lambda name: not name.startswith("B"))


def plan_layout(worker: WorkerWrapperBase, config: VllmConfig) -> None:
    """Decide block size and layout of the KV cache of a worker that has no engine above it.

    The same steps as those of vLLM's executors after loading, and as
    ``EngineCore._initialize_kv_caches`` (vllm/v1/engine/core.py). :func:`bring_up_kv_cache` goes
    on.

    Args:
        worker: with its model loaded.
        config: the worker's; block size and layout are written to it.
    """
    from vllm.envs import enable_envs_cache
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs

    current_platform.update_block_size_for_backend(config)
    enable_envs_cache()  # some are read in every forward
    specs = worker.get_kv_cache_spec()
    register_all_kvcache_specs(config)
    layouts = prefer_blocks_outermost(worker.get_supported_kv_cache_layouts())
    layout = resolve_kv_cache_layout(config, [layouts], list(specs.values()))
    set_layout = worker.set_kv_cache_layout
    if len(inspect.signature(set_layout).parameters) > 1:  # 0.33
        interleave = config.parallel_config.cp_kv_cache_interleave_size
        set_layout(layout.name, interleave)
    else:
        set_layout(layout.name)


def compile_on_cpu(worker: WorkerWrapperBase, config: VllmConfig) -> None:
    """Compile the model of a CPU worker, which needs no KV cache for that.

    Args:
        worker: with its model loaded.
        config: the worker's.
    """
    # vLLM compiles where it finds out what memory is left. With a size given it measures nothing.
    config.cache_config.kv_cache_memory_bytes = 1 << 20
    worker.determine_available_memory()


def bring_up_kv_cache(worker: WorkerWrapperBase, config: VllmConfig) -> tuple[int, int]:
    """Allocate the KV cache, compile if that has not been done, and warm up.

    Args:
        worker: with its layout planned.
        config: the worker's; the number of blocks is written to it.

    Returns:
        Number of blocks and block size.

    Raises:
        ValueError: the model's attention is not plain full attention in one KV cache group.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    specs = worker.get_kv_cache_spec()
    available_bytes = worker.determine_available_memory()
    kv_cache_configs = plan_kv_cache(config, specs, available_bytes)
    (kv_cache_config,) = kv_cache_configs
    groups = kv_cache_config.kv_cache_groups
    plain = len(groups) == 1 and type(groups[0].kv_cache_spec) is FullAttentionSpec
    if not plain or groups[0].kv_cache_spec.sliding_window is not None:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise ValueError(
            f"ssd: the draft model's attention ({kinds or 'none'}) is not plain full attention, "
            "the only kind whose branches can be forked; choose another draft model"
        )
    kv_cache_config.kv_cache_layout = config.cache_config.kv_cache_layout
    config.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
    worker.initialize_from_config(kv_cache_configs)
    worker.compile_or_warm_up_model()
    return kv_cache_config.num_blocks, groups[0].kv_cache_spec.block_size


def plan_kv_cache(config: VllmConfig, specs: Any, available_bytes: int) -> list[Any]:
    """vLLM's plan of the KV cache of one worker, as a list of one ``KVCacheConfig``."""
    try:
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
    except ImportError:  # 0.33
        from vllm.v1.core.kv_cache_planning import (
            get_global_kv_cache_groups,
            get_kv_cache_configs,
        )

        groups = get_global_kv_cache_groups(config, [specs])
        configs: list[Any] = get_kv_cache_configs(
            config, [specs], [available_bytes], global_kv_cache_groups=groups
        )
        return configs
    return list(get_kv_cache_configs(config, [specs], [available_bytes]))


def copy_kv_blocks(
    kv_caches: Sequence[torch.Tensor],
    num_blocks: int,
    sources: Int32Array,
    destinations: Int32Array,
) -> None:
    """Copy KV blocks in every layer, on the current stream.

    Args:
        kv_caches: of all layers.
        num_blocks: how many blocks each has.
        sources: ``[c]``, blocks to copy.
        destinations: ``[c]``, where to; none of them is a source.
    """
    if all(cache.device.type == "cpu" and cache.is_contiguous() for cache in kv_caches):
        for cache in kv_caches:
            # Whole blocks at a time, where torch's index operations go element by element.
            blocks = cache.view(num_blocks, -1).view(torch.uint8).numpy()
            blocks[destinations] = blocks[sources]
        return
    from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
    from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

    copies = list(map(KVCacheBlockCopy, sources.tolist(), destinations.tolist()))
    copy_kv_cache_blocks_inplace(kv_caches, num_blocks, copies)
