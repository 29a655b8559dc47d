"""How the draft is brought up: its engine arguments, its rows, its share of the memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from vllm_ssd.config import SSDConfig
from vllm_ssd.draft_vocab import select_draft_vocab
from vllm_ssd.preflight import (
    check_kv_cache,
    draft_model_config,
    kv_bytes_per_token,
    resolve_draft_device,
)
from vllm_ssd.wire.messages import MAX_ROWS, Setup, pack

logger = logging.getLogger("vllm.vllm_ssd")

CPU_BLOCK_SIZE = 32
"""Tokens per KV block on CPU, the least its attention likes; a fork copies at most one block."""
PREFILL_TOKENS = 256
"""Prompt tokens per step on CPU beyond a full batch of rows: bounds how long a step can take."""
PREFILL_TOKENS_CUDA = 2048
RUNTIME_BYTES = 512 << 20
"""Libraries, activations and workspaces of the draft process on a shared device."""


@dataclass
class DraftPlan:
    """What the draft process is told at its start, and what it costs the target."""

    setup: Setup
    max_model_len: int
    """Longest text it follows."""
    shares_device: bool
    target_size_is_given: bool
    """Whether the user has said how large the target's KV cache is."""
    kv_bytes_per_token: int
    weight_bytes: int
    rows: int
    requests: int
    kv_cache_memory_bytes: int
    """Its KV cache; 0 until :meth:`share_memory`, or for what vLLM finds on its own device."""
    taken_from_target: int = 0
    """Bytes the target leaves to it."""
    target_kv_bytes_per_token: int = 0

    @property
    def may_start_early(self) -> bool:
        """Whether the draft may load its libraries while the target still comes up.

        Not where vLLM measures a shared device's free memory: the draft's would be missing there.
        """
        return not self.shares_device or self.target_size_is_given

    def share_memory(self, available: int) -> None:
        """Give the draft its part of ``available`` bytes, unless it has a device of its own.

        By default both hold the same number of tokens. An explicit size of the target's KV cache is
        the user's word: then the draft's comes on top.

        Raises:
            ValueError: nothing would be left for the target.
        """
        if not self.shares_device:
            return
        explicit = self.target_size_is_given
        if self.kv_cache_memory_bytes == 0:
            overhead = 0 if explicit else self.weight_bytes + RUNTIME_BYTES
            tokens = max(0, available - overhead) // (
                self.target_kv_bytes_per_token + (0 if explicit else self.kv_bytes_per_token)
            )
            useful = self.requests * self.max_model_len
            own_blocks = 2 * self.rows * CPU_BLOCK_SIZE
            self.kv_cache_memory_bytes = self.kv_bytes_per_token * (
                min(tokens, useful) + own_blocks
            )
        check_kv_cache(self.kv_cache_memory_bytes, self.kv_bytes_per_token, self.max_model_len)
        if explicit:
            return
        self.taken_from_target = self.kv_cache_memory_bytes + self.weight_bytes + RUNTIME_BYTES
        if self.taken_from_target >= available:
            raise ValueError(
                f"ssd: the draft needs {self.taken_from_target >> 20} MiB of the "
                f"{available >> 20} MiB left for KV caches; lower draft_kv_cache_memory_bytes or "
                "max_model_len, or choose a smaller draft model"
            )


def plan_draft(config: SSDConfig, vllm_config: Any) -> DraftPlan:
    """Derive the draft's setup from the options and the target's configuration."""
    target = vllm_config.model_config
    draft = draft_model_config(config, target)
    draft_vocab = select_draft_vocab(config, target, draft)
    device = resolve_draft_device(config, vllm_config.parallel_config)
    on_cpu = device == "cpu"
    requests = vllm_config.scheduler_config.max_num_seqs
    # One row per guess, the trunk being one of them.
    rows = min(requests * config.max_branches, MAX_ROWS)
    rows = max(rows, min(requests, MAX_ROWS))
    prefill = PREFILL_TOKENS if on_cpu else PREFILL_TOKENS_CUDA
    arguments: dict[str, str | int | float | bool | None] = {
        "model": draft.model,
        "dtype": str(draft.dtype).removeprefix("torch."),
        "quantization": config.draft_quantization,
        "trust_remote_code": target.trust_remote_code,
        "max_model_len": draft.max_model_len,
        "max_num_seqs": rows,
        "max_num_batched_tokens": rows + prefill,
        "enforce_eager": _enforce_eager(config, target),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,  # the draft keeps its own
        # A size of its own also keeps vLLM from measuring memory that the target has taken.
        "kv_cache_memory_bytes": config.draft_kv_cache_memory_bytes or 1 << 30,
    }
    shares = on_cpu or device in _target_devices(vllm_config.parallel_config)
    if on_cpu:
        arguments["block_size"] = CPU_BLOCK_SIZE
    elif shares:
        logger.warning(
            "ssd: the draft shares %s with the target, which slows both; give it a device of "
            "its own with draft_device",
            device,
        )
        # vLLM refuses to start where less than this part of the device is free, whatever
        # the size of the KV cache.
        arguments["gpu_memory_utilization"] = 0.01
    setup = Setup(
        engine_args=arguments,
        num_speculative_tokens=config.num_speculative_tokens,
        fan_out=list(config.fan_out_per_k or ()),
        branches=0 if config.branches == "auto" else config.branches,
        max_branches=config.max_branches,
        enable_prefix_caching=bool(vllm_config.cache_config.enable_prefix_caching),
        vocab_size=target.get_vocab_size(),
        device_index=0 if on_cpu else int(device.partition(":")[2] or 0),
        draft_vocab=b"" if draft_vocab is None else pack(draft_vocab),
    )
    return DraftPlan(
        setup=setup,
        max_model_len=min(draft.max_model_len, target.max_model_len),
        shares_device=shares,
        target_size_is_given=vllm_config.cache_config.kv_cache_memory_bytes is not None,
        kv_bytes_per_token=kv_bytes_per_token(draft),
        weight_bytes=_weight_bytes(draft, None if draft_vocab is None else len(draft_vocab)),
        rows=rows,
        requests=requests,
        kv_cache_memory_bytes=config.draft_kv_cache_memory_bytes or 0,
        target_kv_bytes_per_token=kv_bytes_per_token(target),
    )


def _weight_bytes(model_config: Any, head_rows: int | None) -> int:
    """Size of the weights, from the shape of a decoder with a gated feed-forward part.

    Args:
        model_config: the model's.
        head_rows: rows selected from its head; None for the head as it is.
    """
    text = model_config.hf_text_config
    hidden = model_config.get_hidden_size()
    layer = 4 * hidden * hidden + 3 * hidden * getattr(text, "intermediate_size", 4 * hidden)
    if head_rows is None:
        head_rows = 0 if getattr(text, "tie_word_embeddings", False) else text.vocab_size
    parameters = text.num_hidden_layers * layer + (text.vocab_size + head_rows) * hidden
    return int(parameters * model_config.dtype.itemsize)


def _enforce_eager(config: SSDConfig, target: Any) -> bool:
    if config.draft_enforce_eager is not None:
        return config.draft_enforce_eager
    return bool(target.enforce_eager)


def _target_devices(parallel_config: Any) -> list[str]:
    return [f"cuda:{index}" for index in range(parallel_config.world_size)]
