"""An actor in an engine's place, which starts at once: it imports no vLLM."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_ssd.draft_resources import DraftResources
from vllm_ssd.on_ray.cluster import placing


class Engine:
    """Finds a place for its draft."""

    def chosen(self, resources: DraftResources) -> Any:
        """Which bundle of its group its draft would get, as a thread of the engine finds it."""
        with ThreadPoolExecutor(1) as thread:
            strategy = thread.submit(placing, resources, True).result()["scheduling_strategy"]
        return getattr(strategy, "placement_group_bundle_index", strategy)
