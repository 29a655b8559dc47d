"""How much memory the draft takes from the target where both share a device.

Functions of plain values, which come from vLLM's own KV cache specs for the target and from the
draft's checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import psutil

from vllm_ssd.target.checkpoint import Tensors

LIBRARY_BYTES = 512 << 20
"""Libraries, the CUDA context, workspaces and graphs of the draft process."""
CPU_BLOCK_SIZE = 32
"""Tokens per KV block on CPU, the fewest for its attention's fast path; a fork copies at most one
block."""
CUDA_BLOCK_SIZE = 16
"""vLLM's own default, which its backends for plain full attention keep."""
_FORKS_PART = 8
"""Forks get at most one part in so many of the memory that target and draft share."""
_NULL_BLOCKS = 1
"""Blocks of a KV cache that vLLM keeps for padding."""
_FLOATS = ("F64", "F32", "F16", "BF16")
"""Safetensors types that vLLM converts to the model's own; it keeps others (quantised)."""


# ---- KV cache


def room_beside(cache_config: Any) -> int:
    """Bytes of a CPU machine's free memory that vLLM leaves free beside the target.

    Args:
        cache_config: vLLM's, of the target. A KV cache of given size is taken beside its weights,
            of which nothing is known yet: half of what is free counts for these.
    """
    memory = psutil.virtual_memory()
    if cache_config.kv_cache_memory_bytes is not None:
        return int(memory.available // 2 - cache_config.kv_cache_memory_bytes)
    return int(memory.available - cache_config.gpu_memory_utilization * memory.total)


def block_size(on_cpu: bool) -> int:
    """Tokens of a KV block of the draft."""
    return CPU_BLOCK_SIZE if on_cpu else CUDA_BLOCK_SIZE


def target_kv_bytes_per_token(specs: Iterable[Any], vllm_config: Any) -> float:
    """KV cache bytes of one token of the target on this device.

    vLLM's specs take into account what a formula over the model's shape would not: latent
    attention, the shards of tensor parallelism, the cache's own type, windows.

    Args:
        specs: of its layers (``Worker.get_kv_cache_spec``).
        vllm_config: the target's.
    """
    # For a text of full length, so that windows and states count with their true size.
    text = sum(spec.max_memory_usage_bytes(vllm_config) for spec in specs)
    return float(text / vllm_config.model_config.max_model_len)


def draft_kv_bytes_per_token(model_config: Any) -> int:
    """KV cache bytes of one token of the draft: plain full attention in all layers, unsharded."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype, resolve_kv_cache_dtype_string

    # A quantised checkpoint may ask for a quantised cache.
    dtype = kv_cache_dtype_str_to_dtype(
        resolve_kv_cache_dtype_string("auto", model_config), model_config
    )
    heads: int = model_config.get_total_num_kv_heads()
    layers: int = model_config.get_total_num_hidden_layers()
    head_size: int = model_config.get_head_size()
    return 2 * layers * heads * head_size * dtype.itemsize


def kv_cache_bytes(
    available: int,
    overhead: int,
    target_bytes_per_token: float,
    draft_bytes_per_token: int,
    useful_tokens: int,
    fork_tokens: int,
    target_size_is_given: bool,
) -> int:
    """The draft's KV cache: room for as many tokens as the target's, and for its forks.

    The draft can do with few forks. They get an eighth of the shared memory at most; beside a
    target of given size, no more tokens than texts do.

    Args:
        available: bytes for the target's KV cache, and for all of the draft unless its size is
            given.
        overhead: bytes the draft needs beside its KV cache.
        target_bytes_per_token: of the target.
        draft_bytes_per_token: of the draft.
        useful_tokens: the most that the draft can use.
        fork_tokens: tokens of the blocks that all forks together can own.
        target_size_is_given: the user has set the target's size, so the draft's comes on top.
    """
    if target_size_is_given:
        tokens = available / target_bytes_per_token if target_bytes_per_token else useful_tokens
        forks = min(fork_tokens, int(tokens))
    else:
        left = max(0, available - overhead)
        forks = min(fork_tokens, left // (_FORKS_PART * draft_bytes_per_token))
        left -= forks * draft_bytes_per_token
        tokens = left / (target_bytes_per_token + draft_bytes_per_token)
    return draft_bytes_per_token * (min(int(tokens), useful_tokens) + forks)


def check_kv_cache(size: int, bytes_per_token: int, length: int, block_size: int) -> None:
    """Refuse a KV cache of the draft that does not hold one text of full length; vLLM would.

    Args:
        size: its bytes.
        bytes_per_token: of the draft.
        length: the longest text the draft follows.
        block_size: tokens of a KV block.

    Raises:
        ValueError: names the size that is needed.
    """
    needed = smallest_kv_cache(bytes_per_token, length, block_size)
    if size < needed:
        holds = longest_text(size, bytes_per_token, block_size)
        raise ValueError(
            f"ssd: option 'draft_kv_cache_memory_bytes' = {size} holds {holds} tokens, fewer than "
            f"a text of {length}; raise it to {needed}, or lower draft_max_model_len"
        )


def smallest_kv_cache(bytes_per_token: int, length: int, block_size: int) -> int:
    """Bytes of a KV cache that holds one text of ``length`` tokens."""
    return (-(-length // block_size) + _NULL_BLOCKS) * block_size * bytes_per_token


def longest_text(size: int, bytes_per_token: int, block_size: int) -> int:
    """Tokens of the longest text a KV cache of ``size`` bytes holds."""
    return max(0, size // (bytes_per_token * block_size) - _NULL_BLOCKS) * block_size


# ---- everything else


class Shape(NamedTuple):
    """The numbers that determine the memory of a decoder with gated feed-forward parts."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    """Of a dense feed-forward part."""
    experts: int
    expert_intermediate: int
    vocabulary: int
    tied: bool
    """Whether the head is the embedding."""

    @property
    def parameters(self) -> int:
        """How many there are, norms and biases aside."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        dense = 3 * self.hidden * self.intermediate
        experts = self.experts * 3 * self.hidden * self.expert_intermediate
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        # Some mixtures have dense layers, others a shared expert: both fit into ``dense``.
        return self.layers * (attention + dense + experts) + tables


def shape_of(model_config: Any) -> Shape:
    """The shape of vLLM's model configuration."""
    text = model_config.hf_text_config
    hidden: int = model_config.get_hidden_size()
    intermediate: int = getattr(text, "intermediate_size", None) or 4 * hidden
    return Shape(
        layers=model_config.get_total_num_hidden_layers(),
        hidden=hidden,
        heads=text.num_attention_heads,
        kv_heads=model_config.get_total_num_kv_heads(),
        head_size=model_config.get_head_size(),
        intermediate=intermediate,
        experts=model_config.get_num_experts(),
        expert_intermediate=getattr(text, "moe_intermediate_size", None) or intermediate,
        vocabulary=model_config.get_vocab_size(),
        tied=bool(getattr(text, "tie_word_embeddings", False)),
    )


def weight_bytes(
    tensors: Tensors, shape: Shape, itemsize: int, head_rows: int | None, on_cpu: bool
) -> int:
    """Memory of the draft's weights.

    Args:
        tensors: of the checkpoint; empty if it cannot be read (yet): then ``shape`` is used.
        shape: the model's.
        itemsize: bytes of the model's type, to which all that is not quantised is converted.
        head_rows: rows selected from the head (``draft_vocab``); None for the head as it is.
        on_cpu: vLLM then holds the head's rows a second time, laid out for matrix products.
    """
    row = shape.hidden * itemsize
    if tensors:
        total = sum(
            tensor.elements * itemsize if tensor.dtype in _FLOATS else tensor.bytes
            for name, tensor in tensors.items()
            if not (shape.tied and name.endswith("lm_head.weight"))
        )
    else:
        total = shape.parameters * itemsize
    if head_rows is not None:
        total += head_rows * row
        if not shape.tied:
            total -= shape.vocabulary * row
    if on_cpu:
        total += (shape.vocabulary if head_rows is None else head_rows) * row
    return max(0, total)


def working_bytes(rows: int, tokens: int, logits: int, shape: Shape, itemsize: int) -> int:
    """Memory of one step's activations and logits.

    Args:
        rows: sequences of a step; each has one row of logits.
        tokens: query tokens of a step.
        logits: logits of a row: the size of the vocabulary or of the selected head.
        shape: the model's.
        itemsize: bytes of the model's type.
    """
    # vLLM's warm-up samples from all rows once, in float32.
    scores = rows * logits * (itemsize + 4)
    widest = 4 * shape.hidden + 3 * max(shape.intermediate, shape.expert_intermediate)
    return scores + tokens * widest * itemsize
