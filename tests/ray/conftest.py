"""A cluster of two nodes on this machine, and what a draft is ordered with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.robustness import harness

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0
"""An actor comes up within this time on a busy machine."""


@dataclass
class Nodes:
    """The cluster; this process is on its first node, and only the second has ``draft``."""

    cluster: Any
    second: Any

    @property
    def address(self) -> str:
        """For a process that is started."""
        return str(self.cluster.address)

    def add(self, **resources: float) -> Any:
        """One more node."""
        return self.cluster.add_node(num_cpus=2, resources=resources)

    def kill(self, node: Any) -> None:
        """As when a machine fails."""
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Its processes find our packages whether they are installed or not."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, "resources": {"target": 8.0}}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            second = cluster.add_node(num_cpus=2, resources={"draft": 1.0})
            quiet = {"configure_logging": False, "log_to_driver": False}
            ray.init(address=cluster.address, namespace="tests", **quiet)
            yield Nodes(cluster, second)
        finally:
            ray.shutdown()
            cluster.shutdown()


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


def raylet(node: Any) -> int:
    """The process id of a node's raylet."""
    (process,) = node.all_processes["raylet"]
    return int(process.process.pid)


def wait_until_gone(*pids: int, seconds: float = 20.0) -> None:
    """Wait for processes to end."""
    harness.wait_for(lambda: not any(map(harness.is_alive, pids)), seconds, f"{pids} gone")
