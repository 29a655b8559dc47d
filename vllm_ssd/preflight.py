"""What is checked before anything heavy loads; every refusal is one sentence with the mend."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_ssd import compat
from vllm_ssd.config import ADDITIONAL_CONFIG_KEY, SSDConfig
from vllm_ssd.draft_vocab import select_draft_vocab

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

_BLOCK_TOKENS = 32
"""Of a KV block, at most: a size is rounded up to whole ones."""


def check_engine(vllm_config: VllmConfig) -> SSDConfig:
    """Check a finished vLLM configuration that uses the plugin; the options in it.

    Raises:
        ValueError: something in it cannot work.
        RuntimeError: this vLLM is not supported.
    """
    options = (vllm_config.additional_config or {}).get(ADDITIONAL_CONFIG_KEY)
    if not isinstance(options, dict):
        raise ValueError(
            "ssd: SSDWorker finds no options; set additional_config (--additional-config) to "
            '{"ssd": {"model": DRAFT, "num_speculative_tokens": K}}'
        )
    config = SSDConfig.parse(options)
    speculative = vllm_config.speculative_config
    known = speculative.num_speculative_tokens if speculative is not None else None
    if known != config.num_speculative_tokens:
        raise ValueError(
            f"ssd: option 'num_speculative_tokens' = {config.num_speculative_tokens} differs from "
            f"the speculative config's {known}; set both to the same number"
        )
    check(
        config,
        vllm_config.model_config,
        vllm_config.parallel_config,
        async_scheduling=False,  # vLLM itself has refused it for custom_class by now
    )
    return config


def check(
    config: SSDConfig,
    target: ModelConfig,
    parallel: ParallelConfig,
    async_scheduling: bool | None,
) -> None:
    """Check the options against the target and the machine. Raises as :func:`check_engine`."""
    compat.check_vllm_version()
    compat.check_hooks()
    _check_parallelism(parallel)
    _check_runner(async_scheduling)
    resolve_draft_device(config, parallel)
    draft = draft_model_config(config, target)
    check_attention(draft)
    if config.draft_kv_cache_memory_bytes is not None:
        check_kv_cache(
            config.draft_kv_cache_memory_bytes, kv_bytes_per_token(draft), draft.max_model_len
        )
    check_vocabulary(target, draft)
    select_draft_vocab(config, target, draft)


def _check_parallelism(parallel: ParallelConfig) -> None:
    from vllm import envs

    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"ssd: pipeline_parallel_size = {parallel.pipeline_parallel_size} is not supported "
            "(vLLM's speculative decoding fails with it); use tensor_parallel_size"
        )
    backend = parallel.distributed_executor_backend
    if backend == "external_launcher":
        raise ValueError(
            "ssd: distributed_executor_backend = 'external_launcher' is not supported; use 'mp'"
        )
    # 0.33 has no other executor for Ray than the newer one.
    if backend == "ray" and not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True):
        raise ValueError(
            "ssd: VLLM_USE_RAY_V2_EXECUTOR_BACKEND = 0 is not supported, Ray's older executor "
            "passes the worker by; unset it"
        )
    if parallel.data_parallel_size > 1:
        raise ValueError(
            f"ssd: data_parallel_size = {parallel.data_parallel_size} is not supported, every rank "
            "would need a draft device of its own; start one server per rank"
        )


def _check_runner(async_scheduling: bool | None) -> None:
    from vllm import envs

    if async_scheduling:
        raise ValueError(
            "ssd: async_scheduling = True is not supported by vLLM for custom proposers; "
            "leave it unset"
        )
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        raise ValueError(
            "ssd: VLLM_USE_V2_MODEL_RUNNER = 1 is not supported, vLLM's V2 model runner has no "
            "custom proposers; unset it"
        )


def resolve_draft_device(config: SSDConfig, parallel: ParallelConfig) -> str:
    """The draft's device: ``"cpu"`` or ``"cuda:<index>"``.

    Raises:
        ValueError: there is no such device.
    """
    from vllm.platforms import current_platform

    wanted = config.draft_device
    if current_platform.is_cpu():
        if wanted not in ("auto", "cpu"):
            raise ValueError(
                f"ssd: option 'draft_device' = {wanted!r}: this vLLM is built for CPU; use 'cpu'"
            )
        return "cpu"
    if wanted == "cpu":
        raise ValueError(
            "ssd: option 'draft_device' = 'cpu': this vLLM is built for CUDA and has no CPU "
            "kernels; use a CUDA device"
        )
    count = current_platform.device_count()
    if wanted == "auto":
        free = parallel.world_size
        return f"cuda:{free if free < count else 0}"
    index = int(wanted.partition(":")[2] or 0)
    if index >= count:
        raise ValueError(
            f"ssd: option 'draft_device' = {wanted!r}: there are {count} CUDA devices; "
            f"use cuda:0 to cuda:{count - 1}"
        )
    return f"cuda:{index}"


def check_cores(wanted: list[int] | None, allowed: list[int]) -> None:
    """Refuse cores that cannot be had.

    Raises:
        ValueError: names the core and those that can.
    """
    missing = [core for core in wanted or () if core not in allowed]
    if missing:
        raise ValueError(
            f"ssd: option 'draft_cpu_cores' = {wanted}: core {missing[0]} is not available; "
            f"use some of {allowed}"
        )


def draft_model_config(config: SSDConfig, target: ModelConfig) -> ModelConfig:
    """vLLM's configuration of the draft model.

    Raises:
        ValueError: the model cannot be found or read.
    """
    from vllm.config import ModelConfig

    name = config.model
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"ssd: option 'model' = {name!r}: there is no such folder; give the draft model's "
            "folder or its hub name"
        )
    try:
        draft = ModelConfig(
            model=os.path.expanduser(name),
            tokenizer=target.tokenizer,
            skip_tokenizer_init=True,
            dtype=config.draft_dtype or target.dtype,
            quantization=config.draft_quantization,
            trust_remote_code=target.trust_remote_code,
            enforce_eager=True,
        )
    except Exception as error:  # vLLM, transformers and hub clients each raise their own
        reason = _first_sentence(error)
        if config.draft_quantization and "quantization" in reason:
            option, value = "draft_quantization", config.draft_quantization
        else:
            option, value = "model", name
            reason += "; give the folder or the hub name of a model that this vLLM supports"
        raise ValueError(f"ssd: option {option!r} = {value!r}: {reason}") from error
    longest = draft.max_model_len
    wanted = config.draft_max_model_len or target.max_model_len
    if config.draft_max_model_len and wanted > longest:
        raise ValueError(
            f"ssd: option 'draft_max_model_len' = {wanted}: the draft model supports at most "
            f"{longest}; lower it"
        )
    draft.max_model_len = min(wanted, longest)
    return draft


def kv_bytes_per_token(model_config: Any) -> int:
    """KV cache bytes of one token in all layers, unsharded."""
    text = model_config.hf_text_config
    heads = model_config.get_total_num_kv_heads()
    size: int = model_config.dtype.itemsize
    layers: int = text.num_hidden_layers
    return 2 * layers * heads * model_config.get_head_size() * size


def check_kv_cache(size: int, bytes_per_token: int, length: int) -> None:
    """Refuse a KV cache of the draft that does not hold one text of full length; vLLM would.

    Args:
        size: its bytes.
        bytes_per_token: of the draft.
        length: the longest text the draft follows.

    Raises:
        ValueError: names the size that is needed.
    """
    needed = -(-length // _BLOCK_TOKENS) * _BLOCK_TOKENS * bytes_per_token
    if size < needed:
        raise ValueError(
            f"ssd: option 'draft_kv_cache_memory_bytes' = {size} holds {size // bytes_per_token} "
            f"tokens, fewer than a text of {length}; raise it to {needed}, or lower "
            "draft_max_model_len"
        )


def check_attention(draft: ModelConfig) -> None:
    """Refuse a draft whose branches cannot be forked, as far as its configuration tells.

    Raises:
        ValueError: names the attention.
    """
    layers = getattr(draft.hf_text_config, "layer_types", None)
    slides = layers is None or "sliding_attention" in layers
    kinds = {
        "none": draft.is_attention_free,
        "mixed with state-space layers": draft.is_hybrid,
        "multi-head latent": draft.use_mla,
        "chunked": draft.attention_chunk_size,
        "a sliding window": slides and draft.get_sliding_window(),
        "across an encoder": draft.is_encoder_decoder,
    }
    for kind, found in kinds.items():
        if found:
            raise ValueError(
                f"ssd: option 'model' = {draft.model!r}: its attention ({kind}) is not plain full "
                "attention, the only kind whose branches can be forked; choose another draft model"
            )


def check_vocabulary(target: ModelConfig, draft: ModelConfig) -> None:
    """Refuse a draft with another tokenizer. Padded vocabularies of one tokenizer are fine.

    Raises:
        ValueError: names a token on which they differ.
    """
    if _same_tokenizer_file(target.tokenizer, draft.model):
        return
    from transformers import AutoTokenizer

    try:
        ours = AutoTokenizer.from_pretrained(
            target.tokenizer, trust_remote_code=target.trust_remote_code
        ).get_vocab()
        theirs = AutoTokenizer.from_pretrained(
            draft.model, trust_remote_code=target.trust_remote_code
        ).get_vocab()
    except Exception as error:  # transformers and its tokenizers each raise their own
        # A folder of weights alone: nothing to compare but the size.
        if target.get_vocab_size() == draft.get_vocab_size():
            return
        raise ValueError(
            f"ssd: option 'model' = {draft.model!r}: it has no tokenizer and another vocabulary "
            f"size ({draft.get_vocab_size()}) than the target ({target.get_vocab_size()}); "
            "choose a draft with the target's tokenizer"
        ) from error
    # By id, so that the same pair of tokenizers is refused in the same words every time.
    for token, token_id in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token, token_id) != token_id:
            raise ValueError(
                f"ssd: option 'model' = {draft.model!r}: its tokenizer differs from the target's "
                f"({token!r} is {theirs[token]} there and {token_id} in the target); choose a "
                "draft with the target's tokenizer"
            )
    shared = len(ours.keys() & theirs.keys())
    if shared < 0.9 * max(len(ours), len(theirs)):
        raise ValueError(
            f"ssd: option 'model' = {draft.model!r}: its tokenizer shares only {shared} of "
            f"{len(ours)} tokens with the target's; choose a draft with the target's tokenizer"
        )


def _same_tokenizer_file(one: str, other: str) -> bool:
    """Whether two local folders hold byte-identical tokenizers: the quick way to yes."""
    files = [Path(folder) / "tokenizer.json" for folder in (one, other)]
    if not all(file.is_file() for file in files):
        return False
    return files[0].samefile(files[1]) or files[0].read_bytes() == files[1].read_bytes()


def _first_sentence(error: Exception) -> str:
    """The first line of what an error says, without pydantic's frame around it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, ValidationError):
        lines = str(error.errors()[0]["msg"]).splitlines()
    return lines[0].removeprefix("Value error, ").removesuffix(".")
