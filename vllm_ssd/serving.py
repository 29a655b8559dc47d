"""Brings up a draft server that several targets share, however it was started."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm_ssd.draft.server import DraftServer

if TYPE_CHECKING:
    from vllm_ssd.draft.agreement import Offer
    from vllm_ssd.wire.messages import Setup

logger = logging.getLogger("vllm.vllm_ssd.draft")

_PART_OF_FREE_MEMORY = 2
"""By default the KV cache takes one part in so many of a CPU machine's free memory at most."""


def kv_cache_on_cpu(useful_bytes: int) -> int:
    """The default size of a draft's KV cache on this machine's CPU.

    Args:
        useful_bytes: what its requests can fill.
    """
    import psutil

    return min(useful_bytes, psutil.virtual_memory().available // _PART_OF_FREE_MEMORY)


def bring_up(server: DraftServer, setup: Setup, kv_cache_bytes: int, vocabulary: str) -> Offer:
    """Load the model, and tell the log what that is at.

    Args:
        server: which gets it.
        setup: the model, and what it must be able to do.
        kv_cache_bytes: 0 for what vLLM finds.
        vocabulary: a hash of the vocabulary that targets must have; empty for any.

    Raises:
        Exception: whatever vLLM finds wrong.
    """
    server.bring_up(setup, lambda what: logger.info("ssd: the draft server %s", what), vocabulary)
    return server.allocate(kv_cache_bytes)
