"""How the draft is brought up: its engine arguments, its rows, its share of the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from vllm_ssd.config import SSDConfig
from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.preflight import Checked
from vllm_ssd.target import memory
from vllm_ssd.target.checkpoint import checkpoint_tensors
from vllm_ssd.target.draft_config import fits_length, source_arguments
from vllm_ssd.target.placement import place_by_ray, place_draft
from vllm_ssd.wire.messages import MAX_ROWS, Setup
from vllm_ssd.wire.packing import pack

if TYPE_CHECKING:
    from vllm.config import ModelConfig

PREFILL_TOKENS = 256
"""Prompt tokens per step on CPU beyond a full batch of rows: bounds how long a step can take."""
PREFILL_TOKENS_CUDA = 2048


@dataclass
class DraftPlan:
    """The draft process's set-up, and the memory it takes from the target."""

    setup: Setup
    device: str | None
    """Its entry of ``CUDA_VISIBLE_DEVICES``; None on CPU."""
    max_model_len: int
    """Longest text it follows."""
    fits_length: bool
    """Whether that is lowered to what its KV cache holds (``--max-model-len auto``)."""
    shares_device: bool
    has_room: bool
    """Whether the target and the draft both find the memory they take, whoever is first: on CPU,
    where vLLM measures nothing but its own process."""
    target_size_is_given: bool
    """Whether the user has set the size of the target's KV cache."""
    kv_bytes_per_token: int
    overhead_bytes: int
    """What it needs beside its KV cache."""
    block_size: int
    """Tokens of a KV block."""
    rows: int
    requests: int
    kv_cache_memory_bytes: int
    """Its KV cache; 0 until :meth:`share_memory`, or for what vLLM finds on its own device."""
    taken_from_target: int = 0
    """Bytes the target leaves to it."""

    @property
    def may_start_early(self) -> bool:
        """Whether the draft may load its libraries while the target still comes up.

        Not while vLLM measures the free memory of a shared device: the draft's would count as
        used. Nor before the longest text is known.
        """
        if not self.shares_device:
            return True
        return (self.target_size_is_given or self.has_room) and not self.fits_length

    @property
    def useful_kv_bytes(self) -> int:
        """A KV cache for all requests of full length, and for their forks."""
        # A fork owns a copy of one block, and the block it grows into.
        fork_tokens = 2 * self.rows * self.block_size
        return self.kv_bytes_per_token * (self.requests * self.max_model_len + fork_tokens)

    def share_memory(self, available: int, target_kv_bytes_per_token: float) -> None:
        """Give the draft its part of ``available`` bytes, unless it has a device of its own.

        By default both hold the same number of tokens. If the user has set the size of the
        target's KV cache, that is kept and the draft's comes on top.

        Args:
            available: bytes that vLLM found for the target's KV cache on this device.
            target_kv_bytes_per_token: of the target, on this device.

        Raises:
            ValueError: nothing would be left for the target.
        """
        if not self.shares_device:
            return
        if self.kv_cache_memory_bytes == 0:
            self.kv_cache_memory_bytes = memory.kv_cache_bytes(
                available,
                self.overhead_bytes,
                target_kv_bytes_per_token,
                self.kv_bytes_per_token,
                useful_tokens=self.requests * self.max_model_len,
                # A fork owns a copy of one block, and the block it grows into.
                fork_tokens=2 * self.rows * self.block_size,
                target_size_is_given=self.target_size_is_given,
            )
            if self.target_size_is_given and not self.fits_length:
                # A target that is too small is refused by vLLM, not for the draft's sake.
                self.kv_cache_memory_bytes = max(
                    self.kv_cache_memory_bytes,
                    memory.smallest_kv_cache(
                        self.kv_bytes_per_token, self.max_model_len, self.block_size
                    ),
                )
            self.fit_length()
        memory.check_kv_cache(
            self.kv_cache_memory_bytes, self.kv_bytes_per_token, self.max_model_len, self.block_size
        )
        if self.target_size_is_given:
            return
        self.taken_from_target = self.kv_cache_memory_bytes + self.overhead_bytes
        if self.taken_from_target >= available:
            raise ValueError(
                f"ssd: the draft needs {self.taken_from_target >> 20} MiB of the "
                f"{available >> 20} MiB left for KV caches; lower draft_kv_cache_memory_bytes if "
                "it is set, branches or --max-num-seqs (which size the draft's batch), or choose "
                "a smaller draft model"
            )

    def fit_length(self) -> None:
        """With ``--max-model-len auto``, follow no longer text than the KV cache holds."""
        if self.fits_length and self.kv_cache_memory_bytes:
            holds = memory.longest_text(
                self.kv_cache_memory_bytes, self.kv_bytes_per_token, self.block_size
            )
            # A cache that holds no text at all is refused later, with the full length.
            self.max_model_len = min(self.max_model_len, holds) or self.max_model_len
            # The draft process has not been started yet.
            self.setup.engine_args["max_model_len"] = self.max_model_len


def plan_draft(checked: Checked, vllm_config: Any) -> DraftPlan:
    """Derive the draft's setup from the options and the target's configuration.

    Args:
        checked: the result of the checks.
        vllm_config: the target's.

    Raises:
        ValueError: the device that the options name is not there.
    """
    config, draft, draft_vocab, _ = checked
    if draft is None:
        raise ValueError("ssd: a draft server brings its own model up")
    target = vllm_config.model_config
    if config.draft_placement == "ray":
        placement = place_by_ray()
    else:
        placement = place_draft(config.draft_device, vllm_config.parallel_config)
    on_cpu = placement.device is None
    requests = vllm_config.scheduler_config.max_num_seqs
    size = batch_size(config, requests, on_cpu)
    download_dir = vllm_config.load_config.download_dir
    overhead = _overhead_bytes(config, draft, draft_vocab, size, download_dir, on_cpu)
    has_room = on_cpu and memory.room_beside(vllm_config.cache_config) > overhead
    setup = setup_of(config, target, draft, draft_vocab, size, on_cpu, download_dir)
    if placement.shared and not on_cpu:
        # vLLM refuses to start where less than this part of the device is free, whatever
        # the size of the KV cache.
        setup.engine_args["gpu_memory_utilization"] = 0.01
    plan = DraftPlan(
        setup=replace(
            setup,
            enable_prefix_caching=bool(vllm_config.cache_config.enable_prefix_caching),
            draft_top_n=0 if config.draft_sampling == "greedy" else config.draft_top_n,
            load_early=has_room,
        ),
        device=placement.device,
        max_model_len=min(draft.max_model_len, target.max_model_len),
        fits_length=fits_length(config, target),
        shares_device=placement.shared,
        has_room=has_room,
        target_size_is_given=vllm_config.cache_config.kv_cache_memory_bytes is not None,
        kv_bytes_per_token=memory.draft_kv_bytes_per_token(draft),
        overhead_bytes=overhead,
        block_size=memory.block_size(on_cpu),
        rows=size.rows,
        requests=requests,
        kv_cache_memory_bytes=config.draft_kv_cache_memory_bytes or 0,
    )
    plan.fit_length()
    return plan


class BatchSize(NamedTuple):
    """How large the draft's steps can be."""

    rows: int
    """One for each guess, the trunk being one of them."""
    tokens: int
    """Query tokens: a full batch of rows, and prompts beside it."""


def batch_size(config: SSDConfig, requests: int, on_cpu: bool) -> BatchSize:
    """The draft's batch.

    Args:
        config: the options.
        requests: the most at once.
        on_cpu: whether the draft runs on CPU.
    """
    rows = max(min(requests * config.max_branches, MAX_ROWS), min(requests, MAX_ROWS))
    return BatchSize(rows, rows + (PREFILL_TOKENS if on_cpu else PREFILL_TOKENS_CUDA))


def setup_of(
    config: SSDConfig,
    target: ModelConfig,
    draft: ModelConfig,
    draft_vocab: Int32Array | None,
    size: BatchSize,
    on_cpu: bool,
    download_dir: str | None = None,
) -> Setup:
    """How a draft is brought up, with a prefix cache and able to sample.

    Args:
        config: the options.
        target: what the draft takes from its target.
        draft: vLLM's configuration of the draft model.
        draft_vocab: ``[N]``, the tokens the head is computed for; None for all.
        size: of its batch.
        on_cpu: whether it runs on CPU.
        download_dir: of models from the hub.
    """
    return Setup(
        engine_args=_engine_arguments(config, target, draft, size, on_cpu, download_dir),
        num_speculative_tokens=config.num_speculative_tokens,
        max_branches=config.max_branches,
        enable_prefix_caching=True,
        vocab_size=target.get_vocab_size(),
        draft_vocab=b"" if draft_vocab is None else pack(draft_vocab),
        draft_top_n=config.draft_top_n,
    )


def _engine_arguments(
    config: SSDConfig,
    target: ModelConfig,
    draft: ModelConfig,
    size: BatchSize,
    on_cpu: bool,
    download_dir: str | None,
) -> dict[str, Any]:
    """Arguments of vLLM's ``EngineArgs`` for the draft model."""
    arguments: dict[str, Any] = {
        **source_arguments(config, target),
        "load_format": config.draft_load_format,
        "download_dir": download_dir,
        "dtype": str(draft.dtype).removeprefix("torch."),
        "quantization": config.draft_quantization,
        "max_model_len": draft.max_model_len,
        "max_num_seqs": size.rows,
        "max_num_batched_tokens": size.tokens,
        "enforce_eager": _enforce_eager(config, target),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,  # the draft has its own (draft/blocks.py)
        # A size of its own also keeps vLLM from measuring memory that the target has taken.
        "kv_cache_memory_bytes": config.draft_kv_cache_memory_bytes or 1 << 30,
    }
    if on_cpu:
        arguments["block_size"] = memory.block_size(on_cpu)
    return arguments


def _overhead_bytes(
    config: SSDConfig,
    draft: ModelConfig,
    draft_vocab: Int32Array | None,
    size: BatchSize,
    download_dir: str | None,
    on_cpu: bool,
) -> int:
    """Memory of the draft beside its KV cache."""
    shape, itemsize = memory.shape_of(draft), draft.dtype.itemsize
    head_rows = None if draft_vocab is None else len(draft_vocab)
    tensors = checkpoint_tensors(draft.model, config.draft_revision, download_dir)
    return (
        memory.weight_bytes(tensors, shape, itemsize, head_rows, on_cpu)
        + memory.working_bytes(*size, head_rows or shape.vocabulary, shape, itemsize)
        + memory.LIBRARY_BYTES
    )


def _enforce_eager(config: SSDConfig, target: ModelConfig) -> bool:
    if config.draft_enforce_eager is not None:
        return config.draft_enforce_eager
    return bool(target.enforce_eager)
