"""The actor of a shared draft: found by name, created once, gone when nobody needs it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from tests.ray.conftest import START_SECONDS, Nodes, draft_actors, pids_of, the_actor
from tests.ray.conftest import wait_until_gone as wait_until_pids_gone
from tests.ray.stand_in import Engine
from tests.robustness import harness
from tests.tiny_models import TinyModels
from vllm_ssd.draft_resources import DraftResources
from vllm_ssd.on_ray.cluster import connected, placing
from vllm_ssd.on_ray.finding import PlacedByRay
from vllm_ssd.on_ray.order import Order
from vllm_ssd.target.links.attachment import ask
from vllm_ssd.wire.channel import Channel, peer_channel
from vllm_ssd.wire.keys import new_key
from vllm_ssd.wire.messages import PROTOCOL, DraftBound, Join, Ready, Setup, TargetBound
from vllm_ssd.wire.network import connect

K = 3
BRANCHES = 4
LINGER = 2.0
"""Seconds."""
NEVER = threading.Event()


def order(model: object, **changes: Any) -> Order:
    """What an engine would order."""
    setup = Setup(
        engine_args={
            "model": str(model),
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 288,
            "block_size": 32,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": 1 << 26,
        },
        num_speculative_tokens=K,
        max_branches=BRANCHES,
        enable_prefix_caching=True,
        vocab_size=512,
        draft_vocab=b"",
        draft_top_n=0,
    )
    values: dict[str, Any] = {
        "setup": setup,
        "vocabulary": "",
        "on_cpu": True,
        "threads": 1,
        "cores": (),
        "kv_cache_bytes": 0,
        "useful_kv_bytes": 1 << 24,
        "linger_s": LINGER,
    }
    return Order(**{**values, **changes})


def shared(model: object, resources: DraftResources | None = None, **changes: Any) -> PlacedByRay:
    """A draft with a name, as one of its engines asks for it."""
    name = "vllm_ssd_draft_ours"
    return PlacedByRay(name, True, order(model, **changes), resources or DraftResources())


def join() -> Join:
    """What a target wants."""
    return Join(PROTOCOL, "", 512, K, [], BRANCHES, BRANCHES, "greedy", 64, 1.0)


@contextmanager
def joined(draft: PlacedByRay, late_s: float = 0.0) -> Iterator[Channel[TargetBound]]:
    """A target of the draft, which joins it so many seconds after it has connected."""
    address, key = draft.find(NEVER)
    channel = peer_channel(connect(address, key, 5.0), TargetBound)
    try:
        time.sleep(late_s)
        channel.send(DraftBound(1, 0, [join()]))
        deadline = time.monotonic() + 10.0
        answers: list[Any] = []
        while not answers and time.monotonic() < deadline:
            answers += [m for frame in channel.receive(1.0) if frame for m in frame.messages]
        assert isinstance(answers[0], Ready)
        yield channel
    finally:
        channel.close()


def test_engines_that_ask_at_once_share_one_actor_until_the_last_has_gone(
    tiny_pair: TinyModels, nodes: Nodes
) -> None:
    resources = DraftResources(draft=0.5)  # type: ignore[call-arg]
    drafts = [shared(tiny_pair.draft, resources) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda draft: draft.find(NEVER), drafts))
    assert found[0] == found[1]
    actor, server = pids_of(the_actor())

    address = found[0][0]
    with pytest.raises(OSError, match="another key"):
        ask(address, new_key(), join())
    with pytest.raises(ValueError, match="the draft of this name has the model"):
        shared(tiny_pair.near).find(NEVER)

    with joined(drafts[0]), suppress(ZeroDivisionError), joined(drafts[1]):
        raise ZeroDivisionError  # the second goes first, without a word
    # As long as an engine is there the draft stays, also for one that still loads its target.
    with joined(drafts[1], late_s=LINGER + 1.0):
        assert pids_of(the_actor()) == (actor, server)
    wait_until_pids_gone(actor, server, seconds=LINGER + 20.0)
    harness.wait_for(lambda: not draft_actors(), 10.0, "no actor left")


@pytest.mark.slow
def test_a_detached_draft_stays_without_engines_until_it_is_killed(
    tiny_pair: TinyModels, nodes: Nodes
) -> None:
    import ray

    draft = shared(tiny_pair.draft, linger_s=None)
    with joined(draft):
        pids = pids_of(the_actor())
    time.sleep(LINGER + 1.0)
    with joined(draft):
        assert pids_of(the_actor()) == pids
    ray.kill(the_actor())
    wait_until_pids_gone(*pids)


@pytest.mark.slow
def test_a_draft_that_cannot_come_up_says_why_and_goes(tmp_path: object, nodes: Nodes) -> None:
    with pytest.raises(OSError, match=r"the draft does not come up: .*no-model"):
        shared(f"{tmp_path}/no-model").find(NEVER)
    harness.wait_for(lambda: not draft_actors(), START_SECONDS, "no actor left")


def test_what_ray_cannot_place_waits_until_the_engine_ends(
    tiny_pair: TinyModels, nodes: Nodes
) -> None:
    resources = DraftResources(elsewhere=1.0)  # type: ignore[call-arg]
    draft = PlacedByRay("vllm_ssd_draft_waits", False, order(tiny_pair.draft), resources)
    ended = threading.Event()
    threading.Timer(1.0, ended.set).start()
    with pytest.raises(OSError, match="the engine has ended"):
        draft.find(ended)
    harness.wait_for(lambda: not draft_actors(), 10.0, "no actor left")


def test_nodes_by_ip_and_id(nodes: Nodes) -> None:
    with connected():
        strategy = placing(DraftResources(node=nodes.second.node_id), True)["scheduling_strategy"]
        assert (strategy.node_id, strategy.soft) == (nodes.second.node_id, True)
        by_ip = placing(DraftResources(node=nodes.second.node_ip_address), True)
        assert by_ip["scheduling_strategy"].soft
        with pytest.raises(ValueError, match=r"node = 'nowhere': Ray has no such node, only"):
            placing(DraftResources(node="nowhere"), True)
        with pytest.raises(ValueError, match="the engine is in no placement group"):
            placing(DraftResources(bundle=1), True)


def test_the_first_bundle_that_the_target_leaves_free(nodes: Nodes) -> None:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundles = [{"target": 1.0, "CPU": 0.5}, {"target": 1.0}, {"CPU": 1.0}]
    group = ray.util.placement_group(bundles)
    ray.get(group.ready(), timeout=START_SECONDS)
    in_first = PlacementGroupSchedulingStrategy(group, 0)
    engine_class = ray.remote(num_cpus=0, resources={"target": 0.5})(Engine)
    engine = engine_class.options(scheduling_strategy=in_first).remote()
    # The second is taken whole: the target's second worker would be there.
    in_second = PlacementGroupSchedulingStrategy(group, 1)
    worker_class = ray.remote(num_cpus=0, resources={"target": 1.0})(Engine)
    worker = worker_class.options(scheduling_strategy=in_second).remote()

    def chosen(**resources: Any) -> Any:
        return ray.get(engine.chosen.remote(DraftResources(**resources)), timeout=START_SECONDS)

    harness.wait_for(lambda: chosen() == 2, 20.0, "the bundle with a whole core")
    harness.wait_for(lambda: chosen(num_cpus=0.5) == 0, 20.0, "the engine's own has half a core")
    assert chosen(bundle=1) == 1
    harness.wait_for(
        lambda: chosen(num_cpus=0.0, target=1.0) == "DEFAULT", 20.0, "Ray to know what is taken"
    )
    with pytest.raises(ValueError, match="has 3, which count from 0"):
        chosen(bundle=3)
    ray.kill(worker)
    harness.wait_for(
        lambda: chosen(num_cpus=0.0, target=1.0) == 1, 20.0, "Ray to know what is free again"
    )
    ray.util.remove_placement_group(group)
