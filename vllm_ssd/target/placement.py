"""Which device the draft gets, decided on the rank that has the draft.

A device is named as ``CUDA_VISIBLE_DEVICES`` names it (an index or a UUID). The draft process sees
only that one, as its first: vLLM's compile cache is keyed by rank, so drafts on devices of
different index would otherwise not share their compiled code.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

logger = logging.getLogger("vllm.vllm_ssd")


class Placement(NamedTuple):
    """Where the draft runs."""

    device: str | None
    """Its entry of ``CUDA_VISIBLE_DEVICES``; None on CPU."""
    shared: bool
    """Whether the target uses it too."""


def visible_devices(setting: str | None, count: int) -> list[str]:
    """The devices this process sees, each as ``CUDA_VISIBLE_DEVICES`` names it.

    Args:
        setting: the variable's value; empty counts as unset, as for vLLM.
        count: how many there are; CUDA ignores entries from the first invalid one on.
    """
    if not setting:
        return [str(index) for index in range(count)]
    return [entry.strip() for entry in setting.split(",")][:count]


def place(
    wanted: str, visible: Sequence[str], used: Collection[int], offered: Collection[int] | None
) -> Placement:
    """Choose the draft's device.

    Args:
        wanted: ``"auto"``, ``"cuda"`` or ``"cuda:<index into visible>"``.
        visible: the devices this process sees.
        used: indices of those the target's workers on this node use.
        offered: indices of those the user lets this engine use (``--device-ids``); None for all.
            Another engine may use the others, so only the user can choose one of them.

    Raises:
        ValueError: there is no such device.
    """
    index = device_index(wanted)
    if index is None:
        candidates = range(len(visible)) if offered is None else sorted(offered)
        free = [device for device in candidates if device not in used]
        index = free[0] if free else min(used)
    if index >= len(visible):
        raise ValueError(
            f"ssd: option 'draft_device' = {wanted!r}: the worker beside the draft sees "
            f"{count_devices(len(visible))} ({', '.join(visible)}); choose one of these"
        )
    return Placement(visible[index], index in used)


def place_draft(wanted: str, parallel: ParallelConfig) -> Placement:
    """Choose the draft's device, in a worker that has its own device already.

    Args:
        wanted: the option ``draft_device``.
        parallel: the target's; its workers on this node have the first of its logical devices.

    Raises:
        ValueError: there is no such device.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return Placement(None, shared=True)
    setting = os.environ.get(current_platform.device_control_env_var)
    visible = visible_devices(setting, current_platform.device_count())
    assigned = parallel.assigned_physical_gpu_ids
    workers = workers_here(parallel.local_world_size, assigned)
    to_visible = current_platform.logical_device_id_to_visible_device_id
    used = {to_visible(logical) for logical in range(workers)}
    # Ray's executors set the list too, to the devices of the workers alone.
    ray = parallel.use_ray
    offered = None if assigned is None or ray else {to_visible(i) for i in range(len(assigned))}
    placement = place(wanted, visible, used, offered)
    if placement.shared:
        logger.warning(
            "ssd: the draft shares CUDA device %s with the target, which slows both; let the "
            "engine use one more (CUDA_VISIBLE_DEVICES, --device-ids) or set draft_device",
            placement.device,
        )
    elif ray:
        logger.warning(
            "ssd: the draft takes CUDA device %s, which Ray does not know; keep others off it",
            placement.device,
        )
    return placement


def place_by_ray() -> Placement:
    """A device that Ray gives the draft, on whichever node: not one of the target's."""
    from vllm.platforms import current_platform

    return Placement(None if current_platform.is_cpu() else "", shared=False)


def workers_here(local_world_size: int, assigned: Sequence[int] | None) -> int:
    """How many of the target's workers are on this node.

    Args:
        local_world_size: vLLM's, which under Ray counts the workers of all nodes.
        assigned: the physical devices of this node's workers in the order of their local ranks,
            perhaps with more behind (``--device-ids``); None if they take the visible ones in turn.
    """
    return local_world_size if assigned is None else min(local_world_size, len(assigned))


def device_index(wanted: str) -> int | None:
    """The index in ``"cuda:<index>"``; None where none is given."""
    index = wanted.partition(":")[2]
    return int(index) if index else None


def count_devices(count: int) -> str:
    """``"1 CUDA device"``, ``"2 CUDA devices"``."""
    return f"{count} CUDA device{'' if count == 1 else 's'}"
