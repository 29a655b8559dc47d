"""Speculative Speculative Decoding (SSD) as a plugin of vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM

__version__ = "0.1.0"
__all__ = ["__version__", "get_stats"]


def get_stats(llm: LLM) -> dict[str, float]:
    """Counters of a running engine's speculation: hits, misses by reason, times, restarts.

    Args:
        llm: an engine started with ``speculative_config={"method": "ssd", ...}``.

    Returns:
        Name to value; the names are explained in docs/operations.md.
    """
    stats: dict[str, float] = {}
    for worker in llm.collective_rpc("ssd_stats"):
        stats.update(worker)
    return stats
