"""This process's connection to Ray, and where in the cluster an actor is to be."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm_ssd.draft_resources import DraftResources

NAMESPACE = "vllm_ssd"
"""Of the actors' names: one for all jobs of a cluster, so that their engines can share."""
logger = logging.getLogger("vllm.vllm_ssd")

_lock = threading.Lock()
_users = 0
_joined = False
"""Whether we have connected this process to a cluster that runs without it."""
_address = ""
"""Of that cluster, for the next time."""


@contextmanager
def connected() -> Iterator[None]:
    """Have this process connected to Ray meanwhile.

    A process that Ray knows already stays as it is. Else it joins the running cluster, and leaves
    it at the end: a process that stays connected is ended by Ray when the cluster's head is lost.
    Where no cluster runs, one is started on this machine; it stays, and ends with this process.

    Raises:
        Exception: whatever Ray finds wrong.
    """
    import ray

    global _users, _joined
    with _lock:
        if not ray.is_initialized():
            _joined = _connect()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _joined and not _users:
                ray.shutdown()
                _joined = False


def _connect() -> bool:
    """Join the running cluster, else start one; whether it was running."""
    global _address
    import ray

    common: dict[str, Any] = {
        "namespace": NAMESPACE,
        "configure_logging": False,
        "log_to_driver": False,
    }
    try:
        ray.init(address=_address or "auto", **common)
    except ConnectionError:
        if _address or os.environ.get("RAY_ADDRESS"):
            raise  # a cluster that is lost: another one would not have the draft's resources
        ray.init(address="local", include_dashboard=False, **common)
        logger.info("ssd: no Ray cluster runs, so one was started on this machine for the draft")
        return False
    _address = ray.get_runtime_context().gcs_address
    logger.info("ssd: connected to Ray at %s", _address)
    return True


def placing(resources: DraftResources, on_cpu: bool) -> dict[str, Any]:
    """Options of an actor: what it needs, and where it is to be.

    Args:
        resources: the option.
        on_cpu: whether the draft runs on CPU.

    Raises:
        ValueError: there is no such node or bundle.
    """
    amounts = resources.amounts(on_cpu)
    return {
        "num_cpus": amounts.pop("CPU", 0.0),
        "num_gpus": amounts.pop("GPU", 0.0),
        "resources": amounts,
        "scheduling_strategy": _strategy(resources, resources.amounts(on_cpu)),
    }


def _strategy(resources: DraftResources, amounts: Mapping[str, float]) -> Any:
    import ray
    from ray.util.scheduling_strategies import (
        NodeAffinitySchedulingStrategy,
        PlacementGroupSchedulingStrategy,
    )

    if resources.node is not None:
        node = _node_id(resources.node, ray.nodes())
        return "DEFAULT" if node is None else NodeAffinitySchedulingStrategy(node, soft=True)
    group = ray.util.get_current_placement_group()
    if group is None:
        if resources.bundle is not None:
            raise ValueError(
                f"ssd: option 'draft_resources': bundle = {resources.bundle}, but the engine is in "
                "no placement group; start it in an actor of one, or leave it out"
            )
        return "DEFAULT"
    count = group.bundle_count
    index = resources.bundle
    if index is None:
        index = _free_bundle(group.id.hex(), count, amounts, ray.available_resources())
    elif index >= count:
        raise ValueError(
            f"ssd: option 'draft_resources': bundle = {index}, but the engine's placement group "
            f"has {count}, which count from 0"
        )
    # Not the group by default: without a bundle that is free the draft would wait for ever.
    return "DEFAULT" if index is None else PlacementGroupSchedulingStrategy(group, index)


def _node_id(wanted: str, nodes: list[dict[str, Any]]) -> str | None:
    """The id of a node that is alive; None if all that were called so are dead.

    Raises:
        ValueError: there was no such node.
    """
    named = [node for node in nodes if wanted in (node["NodeID"], node["NodeManagerAddress"])]
    if not named:
        known = ", ".join(f"{node['NodeManagerAddress']} ({node['NodeID']})" for node in nodes)
        raise ValueError(
            f"ssd: option 'draft_resources': node = {wanted!r}: Ray has no such node, only {known}"
        )
    return next((str(node["NodeID"]) for node in named if node["Alive"]), None)


def _free_bundle(
    group: str, count: int, amounts: Mapping[str, float], free: Mapping[str, float]
) -> int | None:
    """The first bundle in which the amounts are free; None if there is none.

    Args:
        group: the placement group's id.
        count: of its bundles.
        amounts: what is needed, by resource.
        free: what is free in the cluster. Ray counts a bundle's resources by names of their own.
    """
    for index in range(count):
        left = {name: free.get(f"{name}_group_{index}_{group}", 0.0) for name in amounts}
        if all(left[name] >= amount for name, amount in amounts.items()):
            return index
    return None
