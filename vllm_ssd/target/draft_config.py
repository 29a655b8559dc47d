"""vLLM's configuration of the draft model, from the options and the target's configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_ssd.config import SSDConfig

logger = logging.getLogger("vllm.vllm_ssd")


def draft_model_config(config: SSDConfig, target: ModelConfig) -> ModelConfig:
    """vLLM's configuration of the draft model.

    Raises:
        ValueError: the model cannot be found or read, or not be computed in ``draft_dtype``.
    """
    import torch
    from vllm.config import ModelConfig

    check_folder(config.model)
    try:
        draft = ModelConfig(
            **source_arguments(config, target),
            tokenizer=target.tokenizer,
            tokenizer_revision=target.tokenizer_revision,
            skip_tokenizer_init=True,
            dtype=config.draft_dtype or target.dtype,
            quantization=config.draft_quantization,
            enforce_eager=True,
        )
    except Exception as error:  # vLLM, transformers and hub clients each raise their own
        raise ValueError(refusal(config, first_line(error))) from error
    if draft.dtype == torch.float32 and _lacks_float32(draft):
        if config.draft_dtype == "float32":
            raise ValueError(
                f"ssd: option 'draft_dtype' = 'float32': on a CPU with AMX vLLM computes int8 "
                f"layers, as those of {config.model!r}, in 16 bits only; use 'bfloat16', or leave "
                "it out"
            )
        logger.info("ssd: the draft is in bfloat16: vLLM has no float32 for int8 layers here")
        draft.dtype = torch.bfloat16
    longest = draft.max_model_len
    wanted = config.draft_max_model_len or target.max_model_len
    if config.draft_max_model_len and wanted > longest:
        raise ValueError(
            f"ssd: option 'draft_max_model_len' = {wanted}: the draft model supports at most "
            f"{longest}; lower it"
        )
    draft.max_model_len = min(wanted, longest)
    return draft


def in_place_of_target(config: SSDConfig, trust_remote_code: bool) -> ModelConfig:
    """The draft model as its own target: a draft server takes from it what others take from theirs.

    Raises:
        ValueError: the model cannot be found or read.
    """
    from vllm.config import ModelConfig

    check_folder(config.model)
    try:
        return ModelConfig(
            model=absolute_folder(config.model),
            revision=config.draft_revision,
            trust_remote_code=trust_remote_code,
            dtype=config.draft_dtype or "auto",
            enforce_eager=bool(config.draft_enforce_eager),
        )
    except Exception as error:  # vLLM, transformers and hub clients each raise their own
        raise ValueError(refusal(config, first_line(error))) from error


def _lacks_float32(draft: ModelConfig) -> bool:
    """Whether vLLM computes its layers in 16 bits only: int8 weights and activations with AMX.

    There ``CPUInt8ScaledMMLinearKernel`` takes a kernel that refuses other types, at the first step
    (vLLM 0.32).
    """
    import torch
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() and torch.cpu._is_amx_tile_supported()):
        return False
    if draft.quantization != "compressed-tensors":
        return False
    described = getattr(draft.hf_config, "quantization_config", None) or {}
    activations = [
        group.get("input_activations") or {}
        for group in described.get("config_groups", {}).values()
    ]
    return any(
        each.get("type") == "int" and each.get("num_bits") == 8 and each.get("symmetric", True)
        for each in activations
    )


def check_folder(name: str) -> None:
    """Refuse what looks like a folder and is none.

    Raises:
        ValueError: names it.
    """
    looks_local = name.startswith((".", "/", "~")) or (name.count("/") > 1 and "://" not in name)
    if looks_local and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"ssd: option 'model' = {name!r}: there is no such folder; give the draft model's "
            "folder or its hub name"
        )


def fits_length(config: SSDConfig, target: ModelConfig) -> bool:
    """Whether the draft's length is what its KV cache holds, as with ``--max-model-len auto``.

    vLLM lowers the target's length once it knows how much its cache holds, which is later.
    """
    return config.draft_max_model_len is None and target.original_max_model_len == -1


def source_arguments(config: SSDConfig, target: ModelConfig) -> dict[str, Any]:
    """Where the draft comes from: arguments of vLLM's ``ModelConfig`` and ``EngineArgs`` alike."""
    return {
        "model": absolute_folder(config.model),
        "revision": config.draft_revision,
        "code_revision": config.draft_code_revision,
        "hf_overrides": config.draft_hf_overrides or {},
        "trust_remote_code": target.trust_remote_code,
        "hf_token": target.hf_token,
    }


def absolute_folder(name: str) -> str:
    """A folder's absolute name, since the draft may run elsewhere; a hub name as it is."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def refusal(config: SSDConfig, reason: str) -> str:
    """The error message for a draft that vLLM refuses for ``reason``."""
    if config.draft_quantization and "quantization" in reason:
        return f"ssd: option 'draft_quantization' = {config.draft_quantization!r}: {reason}"
    reason = reason.partition(". ")[0]  # what follows may list all its architectures
    revision = f" and that has revision {config.draft_revision!r}" if config.draft_revision else ""
    return (
        f"ssd: option 'model' = {config.model!r}: {reason}; give the folder or the hub name of a "
        f"model that this vLLM supports{revision}"
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, without what pydantic puts around it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, ValidationError):
        lines = str(error.errors()[0]["msg"]).splitlines()
    return lines[0].removeprefix("Value error, ").removesuffix(".")
