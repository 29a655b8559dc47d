"""Keeps our options out of the key of vLLM's compile cache."""

from __future__ import annotations

from collections import UserDict
from typing import Any

from vllm_ssd.config import ADDITIONAL_CONFIG_KEY

_BESIDE = ("gdn_prefill_backend", "kda_prefill_backend", "kda_decode_backend")
"""Engine arguments that vLLM adds to ``additional_config``, and reads from a dictionary only."""


class UnhashedConfig(UserDict[str, Any]):
    """An ``additional_config`` that holds nothing but our options.

    vLLM hashes a dictionary's content into the key of its compile cache, and asks anything else for
    its hash (``SupportsHash``). Our options change nothing in the target's graph, so they all have
    the same: another value of one does not compile the target anew.
    """

    def compute_hash(self) -> str:
        """As ``VllmConfig.compute_hash`` asks for it."""
        return ADDITIONAL_CONFIG_KEY


def keep_compile_key(engine_args: Any) -> None:
    """Make ``additional_config`` one whose content does not count, if it is only ours.

    What else it holds may change the target's graph, and vLLM looks for it in a dictionary.
    """
    additional = engine_args.additional_config
    ours_alone = isinstance(additional, dict) and list(additional) == [ADDITIONAL_CONFIG_KEY]
    if ours_alone and not any(getattr(engine_args, name, None) for name in _BESIDE):
        engine_args.additional_config = UnhashedConfig(additional)
