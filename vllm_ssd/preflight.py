"""The checks before anything heavy loads; every refusal is one sentence with the remedy."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vllm_ssd import compat
from vllm_ssd.config import ADDITIONAL_CONFIG_KEY, SSDConfig
from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.draft_checks import check_device, checked_draft
from vllm_ssd.draft_vocab import select_draft_vocab
from vllm_ssd.target.draft_config import absolute_folder, fits_length
from vllm_ssd.target.links.joining import join_of
from vllm_ssd.target.memory import block_size, check_kv_cache, draft_kv_bytes_per_token
from vllm_ssd.vocabulary import check_vocabulary, tokenizer_hash
from vllm_ssd.wire.messages import Join

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig


logger = logging.getLogger("vllm.vllm_ssd")

_KNOWN_TO_V2: dict[str, tuple[object, ...]] = {
    "backup": ("auto", "ngram", "none"),
    "max_wait_ms": (0.0,),
    "pad_misses": (True,),
}
"""Options of which other values have no effect on vLLM's V2 runner."""
_TAKE_V1 = "set VLLM_USE_V2_MODEL_RUNNER=0 for vLLM's V1 model runner"


class Checked(NamedTuple):
    """The result of the checks, from which the draft is set up."""

    config: SSDConfig
    draft: ModelConfig | None
    """vLLM's configuration of the draft model; None for a draft server's, which has its own."""
    draft_vocab: Int32Array | None
    """``[N]``, the tokens its head is computed for; None for all."""
    join: Join
    """What the target wants of the draft."""


def check_engine(vllm_config: VllmConfig) -> Checked:
    """Check a finished vLLM configuration that uses the plugin.

    Raises:
        ValueError: something in it cannot work.
        RuntimeError: this vLLM is not supported.
    """
    return check(
        engine_options(vllm_config),
        vllm_config.model_config,
        vllm_config.parallel_config,
        async_scheduling=False,  # vLLM itself has refused it by now where it has to be
    )


def engine_options(vllm_config: VllmConfig) -> SSDConfig:
    """The options in a finished vLLM configuration that uses the plugin.

    Raises:
        ValueError: there are none, or they are wrong.
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
    return config


def check(
    config: SSDConfig,
    target: ModelConfig,
    parallel: ParallelConfig,
    async_scheduling: bool | None,
) -> Checked:
    """Check the options against the target and the machine. Raises as :func:`check_engine`."""
    from vllm.platforms import current_platform

    compat.check_vllm_version()
    compat.check_hooks()
    # Ray's workers may be on other machines.
    on_cpu = current_platform.is_cpu()
    count = None if on_cpu or parallel.use_ray else current_platform.device_count()
    check_device(config.draft_device, current_platform.device_name, count)
    _check_parallelism(parallel)
    v2 = takes_v2(parallel)
    check_runner(async_scheduling, v2)
    check_ray(config.draft_placement)
    if config.draft_address is not None:
        return Checked(config, None, None, check_server(config, target))
    draft = checked_draft(config, target)
    if config.draft_kv_cache_memory_bytes is not None and not fits_length(config, target):
        check_kv_cache(
            config.draft_kv_cache_memory_bytes,
            draft_kv_bytes_per_token(draft),
            draft.max_model_len,
            block_size(on_cpu),
        )
    check_vocabulary(config, target, draft)
    # Others may join a draft that has a name.
    shared = config.draft_name is not None
    join = join_of(config, target.get_vocab_size(), _tokenizer_hash(target) if shared else "")
    return Checked(config, draft, select_draft_vocab(config, target, draft), join)


def check_server(config: SSDConfig, target: ModelConfig) -> Join:
    """Ask the draft server at ``draft_address`` whether it drafts for this target.

    A server that cannot be reached now may be there later: that is a warning.

    Returns:
        What it is asked for.

    Raises:
        ValueError: the address or the key cannot be used, or the server refuses the target.
    """
    from vllm_ssd.target.links.attachment import ask, server_of

    address, key = server_of(config)
    join = join_of(config, target.get_vocab_size(), _tokenizer_hash(target))
    try:
        ask(address, key, join)
    except ValueError as error:
        said = f"ssd: option 'draft_address' = {config.draft_address!r}"
        raise ValueError(f"{said}: {error}") from None
    except OSError as error:
        logger.warning("ssd: %s; decoding plainly until there is a draft", error)
    return join


def _tokenizer_hash(target: ModelConfig) -> str:
    return tokenizer_hash(
        target.tokenizer,
        target.tokenizer_revision,
        trust_remote_code=target.trust_remote_code,
        token=target.hf_token,
    )


def check_ray(placement: str) -> None:
    """Refuse a draft that Ray is to place where there is no Ray.

    Raises:
        ValueError: says what to install.
    """
    if placement == "ray" and find_spec("ray") is None:
        raise ValueError(
            "ssd: option 'draft_placement' = 'ray': Ray is not installed; "
            "pip install 'vllm-ssd[ray]'"
        )


def absolute_paths(config: SSDConfig) -> SSDConfig:
    """The options with absolute folders and files: workers may have another working folder."""
    changes = {}
    if config.model:
        changes["model"] = absolute_folder(config.model)
    for name in ("draft_vocab", "draft_key_file"):
        if isinstance(file := getattr(config, name), str):
            changes[name] = str(Path(file).expanduser().absolute())
    return config.model_copy(update=changes)


def _check_parallelism(parallel: ParallelConfig) -> None:
    from vllm import envs

    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"ssd: pipeline_parallel_size = {parallel.pipeline_parallel_size} is not supported "
            "(vLLM's speculative decoding fails with it); use tensor_parallel_size"
        )
    if parallel.prefill_context_parallel_size > 1:
        raise ValueError(
            f"ssd: prefill_context_parallel_size = {parallel.prefill_context_parallel_size} is not "
            "supported (vLLM has it on its V2 model runner only); use tensor_parallel_size"
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


def takes_v2(parallel: ParallelConfig | None = None) -> bool:
    """Whether vLLM takes its V2 model runner with a method of ours (``use_v2_model_runner``).

    Args:
        parallel: vLLM's; None if nothing is known of it.
    """
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        return bool(envs.VLLM_USE_V2_MODEL_RUNNER)
    return bool(HAS_TRITON) and not (parallel is not None and parallel.use_ubatching)


def check_runner(async_scheduling: bool | None, v2: bool) -> None:
    """Refuse settings that do not go with the model runner, and a V2 runner that has changed.

    Args:
        async_scheduling: vLLM's option; None if it is not set.
        v2: whether vLLM takes V2.

    Raises:
        ValueError: names the setting.
        RuntimeError: names what has moved.
    """
    from vllm.triton_utils import HAS_TRITON

    if not v2:
        if async_scheduling:
            raise ValueError(
                "ssd: async_scheduling = True is not supported by vLLM's V1 model runner for "
                "custom proposers; leave it unset"
            )
        return
    if not HAS_TRITON:
        raise ValueError(
            "ssd: VLLM_USE_V2_MODEL_RUNNER = 1: vLLM's V2 model runner needs Triton, which vLLM "
            "does not find here; unset it"
        )
    compat.check_v2_hooks()


def warn_of_v2_options(config: SSDConfig) -> None:
    """One warning that names the options given that have no effect on the V2 runner."""
    given = [
        f"{name} = {getattr(config, name)!r}"
        for name, known in _KNOWN_TO_V2.items()
        if name in config.model_fields_set and getattr(config, name) not in known
    ]
    if given:
        logger.warning(
            "ssd: without effect on vLLM's V2 model runner: %s; leave them out, or %s",
            ", ".join(given),
            _TAKE_V1,
        )
