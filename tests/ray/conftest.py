"""A cluster of two nodes on this machine, and what a draft is ordered with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from tests.robustness import harness

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

START_SECONDS = 120.0
"""An actor comes up within this time on a busy machine."""


@dataclass
class Nodes:
    """The cluster; only its second node has the resource ``draft``."""

    cluster: Any
    second: Any

    def kill_second(self) -> None:
        """As when a machine fails."""
        self.cluster.remove_node(self.second, allow_graceful=False)

    def add(self, **resources: float) -> Any:
        """One more node."""
        return self.cluster.add_node(num_cpus=2, resources=resources)

    def address_is_known(self) -> None:
        """Let processes that are started find the cluster."""
        os.environ["RAY_ADDRESS"] = self.cluster.address


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Started for each test: some of them break it."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 2, "include_dashboard": False, "resources": {"target": 8.0}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = cluster.add_node(num_cpus=2, resources={"draft": 1.0})
        ray.init(
            address=cluster.address,
            namespace="tests",
            configure_logging=False,
            log_to_driver=False,
        )
        yield Nodes(cluster, second)
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)


def draft_actors() -> dict[str, Any]:
    """The drafts that are alive, by name."""
    from vllm_ssd.on_ray.cluster import NAMESPACE

    named = ray.util.list_named_actors(all_namespaces=True)
    names = [one["name"] for one in named if one["namespace"] == NAMESPACE]
    return {name: ray.get_actor(name, namespace=NAMESPACE) for name in names}


def the_actor() -> Any:
    """The only one."""
    (actor,) = draft_actors().values()
    return actor


def pids_of(actor: Any) -> tuple[int, int]:
    """Of the actor and its server."""
    actor_pid, server_pid = ray.get(actor.pids.remote(), timeout=START_SECONDS)
    return actor_pid, server_pid


def node_of(pid: int) -> int:
    """The process id of the raylet that a worker belongs to."""
    return psutil.Process(pid).ppid()


def wait_until_gone(*pids: int, seconds: float = 20.0) -> None:
    """Wait for processes to end."""
    harness.wait_for(lambda: not any(map(harness.is_alive, pids)), seconds, f"{pids} gone")
