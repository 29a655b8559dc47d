"""What the target and its draft take of the memory while an engine comes up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil


class Planned(NamedTuple):
    """The plan of an SSD engine's draft."""

    shares_device: bool
    kv_bytes: int
    """Its KV cache."""
    kv_bytes_per_token: int
    overhead_bytes: int
    taken_from_target: int
    """What the target leaves to it."""
    device: str | None
    """Its entry of ``CUDA_VISIBLE_DEVICES``; None on CPU."""
    rows: int
    setup: Any
    """The draft process's set-up (:class:`vllm_ssd.wire.messages.Setup`)."""


@dataclass
class Marks:
    """Bytes in use on the target's device; on CPU, those of this process and its children.

    They hold what other processes use of a device, so only differences say something.
    """

    asked: int = 0
    """What vLLM may take of the device for all (``gpu_memory_utilization``); 0 on CPU."""
    start: int = 0
    """Before the target has loaded; 0 on CPU."""
    target: int = 0
    """When it has warmed up, and the draft has not allocated anything on a shared device."""
    both: int = 0
    """When the engine is up."""
    worked: int = 0
    """When it has done its work."""
    planned: Planned | None = None


@contextmanager
def marked() -> Iterator[Marks]:
    """An engine that is started inside leaves its marks; ``both`` is set at the end."""
    from vllm.platforms import current_platform

    from vllm_ssd.target.draft_setup import DraftPlan

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
    else:
        from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
    marks = Marks()
    warm_up, share = PlatformWorker.compile_or_warm_up_model, DraftPlan.share_memory

    def noted_warm_up(self: Any) -> Any:
        result = warm_up(self)
        marks.target = used_bytes()
        if not current_platform.is_cpu():
            marks.asked = self.requested_memory
            snapshot = self.init_snapshot
            marks.start = snapshot.total_memory - snapshot.free_memory
        return result

    def noted_share(self: DraftPlan, *args: Any) -> None:
        share(self, *args)
        marks.planned = Planned(
            self.shares_device,
            self.kv_cache_memory_bytes,
            self.kv_bytes_per_token,
            self.overhead_bytes,
            self.taken_from_target,
            self.device,
            self.rows,
            self.setup,
        )

    with (
        patch.object(PlatformWorker, "compile_or_warm_up_model", noted_warm_up),
        patch.object(DraftPlan, "share_memory", noted_share),
    ):
        yield marks
    marks.both = used_bytes()


def used_bytes() -> int:
    """Bytes in use on the current device, by all processes; on CPU by this one and its children."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return int(total - free)
    process = psutil.Process()
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
