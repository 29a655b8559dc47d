"""The checks of the draft model and its device: of a target's own draft, and of a draft server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_ssd.target.draft_config import draft_model_config, first_line
from vllm_ssd.target.placement import count_devices, device_index

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_ssd.config import SSDConfig


def checked_draft(config: SSDConfig, target: ModelConfig) -> ModelConfig:
    """vLLM's configuration of the draft model, if that can be one.

    Raises:
        ValueError: it cannot be found, read or loaded, or its branches cannot be forked.
    """
    draft = draft_model_config(config, target)
    check_load_format(config.draft_load_format, draft)
    check_draft(draft)
    return draft


def check_device(wanted: str, platform: str, count: int | None) -> None:
    """Refuse a platform or a device that does not exist; the draft's worker chooses the device.

    Args:
        wanted: the option ``draft_device``.
        platform: vLLM's name of its platform.
        count: how many devices this process sees; None where the workers may see others.

    Raises:
        ValueError: names what can be used.
    """
    if platform not in ("cpu", "cuda"):
        raise ValueError(
            f"ssd: vLLM's platform {platform!r} is not supported; use a vLLM for CPU or for CUDA"
        )
    said = f"ssd: option 'draft_device' = {wanted!r}"
    if platform == "cpu":
        if wanted not in ("auto", "cpu"):
            raise ValueError(f"{said}: this vLLM is built for CPU; use 'cpu'")
        return
    if wanted == "cpu":
        raise ValueError(
            f"{said}: this vLLM is built for CUDA and has no CPU kernels; use a CUDA device"
        )
    index = device_index(wanted)
    if index is not None and count is not None and index >= count:
        raise ValueError(
            f"{said}: the engine sees {count_devices(count)}, and they count from cuda:0; choose "
            "one of these, or let it see more (CUDA_VISIBLE_DEVICES)"
        )


def check_cores(wanted: list[int] | None, allowed: list[int]) -> None:
    """Refuse cores that this process may not use.

    Raises:
        ValueError: names the core, and those it may use.
    """
    missing = [core for core in wanted or () if core not in allowed]
    if missing:
        raise ValueError(
            f"ssd: option 'draft_cpu_cores' = {wanted}: core {missing[0]} is not available; "
            f"use some of {allowed}"
        )


def check_load_format(wanted: str, draft: ModelConfig) -> None:
    """Refuse a format that no loader of this vLLM reads.

    Raises:
        ValueError: gives vLLM's reason.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    try:
        get_model_loader(EngineArgs(model=draft.model, load_format=wanted).create_load_config())
    except Exception as error:  # each loader has its own
        raise ValueError(
            f"ssd: option 'draft_load_format' = {wanted!r}: {first_line(error)}; leave it out "
            "or use one of vLLM's --load-format"
        ) from error


def check_draft(draft: ModelConfig) -> None:
    """Refuse a draft whose branches cannot be forked, as far as its configuration tells.

    Raises:
        ValueError: names the reason.
    """
    said = f"ssd: option 'model' = {draft.model!r}"
    if draft.runner_type != "generate":
        raise ValueError(f"{said}: it does not generate text; choose another draft model")
    # vLLM feeds such a model embeddings in place of tokens, or three positions for each.
    if draft.is_multimodal_model or draft.uses_mrope:
        raise ValueError(
            f"{said}: it reads more than text (multimodal, M-RoPE), which a draft does not get; "
            "choose a draft model for text alone"
        )
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
                f"{said}: its attention ({kind}) is not plain full attention, the "
                "only kind whose branches can be forked; choose another draft model"
            )
