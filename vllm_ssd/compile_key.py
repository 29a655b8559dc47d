"""Keeps our options out of the key of vLLM's compile cache."""

from __future__ import annotations

from collections import UserDict
from typing import Any

from vllm_ssd.config import ADDITIONAL_CONFIG_KEY

_BESIDE = ("gdn_prefill_backend", "kda_prefill_backend", "kda_decode_backend")
"""Engine arguments that vLLM adds to ``additional_config``, and reads from a dictionary only."""


class UnhashedConfig(UserDict[str, Any]):
    """An ``additional_config`` that holds nothing but our options.

    vLLM hashes a dictionary's content into the key of its compile cache; of any other object it
    calls ``compute_hash`` (``SupportsHash``). Our options change nothing in the target's graph, so
    the hash is constant: the target is not compiled again for another value of one.
    """

    def compute_hash(self) -> str:
        """Called by ``VllmConfig.compute_hash``."""
        return ADDITIONAL_CONFIG_KEY


def keep_compile_key(engine_args: Any) -> None:
    """Keep ``additional_config`` out of the key, if it holds nothing but our options.

    Other entries may change the target's graph, and vLLM reads them from a dictionary only.
    """
    additional = engine_args.additional_config
    ours_alone = isinstance(additional, dict) and list(additional) == [ADDITIONAL_CONFIG_KEY]
    if ours_alone and not any(getattr(engine_args, name) for name in _BESIDE):
        engine_args.additional_config = UnhashedConfig(additional)
