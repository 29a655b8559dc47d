"""Which CUDA device the draft gets: tested on plain values, without a device."""

from __future__ import annotations

import os
from typing import Any

import pytest
from vllm.config import ParallelConfig
from vllm.platforms import interface
from vllm.platforms.cpu import CpuPlatform

from vllm_ssd.draft_checks import check_device
from vllm_ssd.target import placement
from vllm_ssd.target.placement import Placement, place, place_draft, visible_devices, workers_here

FOUR = ["0", "1", "2", "3"]


# ---- what the engine sees


@pytest.mark.parametrize("unset", [None, ""])
def test_without_a_setting_the_devices_are_numbered(unset: str | None) -> None:
    assert visible_devices(unset, 3) == ["0", "1", "2"]


def test_a_setting_names_them_by_index_or_uuid() -> None:
    assert visible_devices("3, 1", 2) == ["3", "1"]
    assert visible_devices("GPU-aa,MIG-bb", 2) == ["GPU-aa", "MIG-bb"]


def test_entries_after_an_invalid_one_are_ignored() -> None:
    assert visible_devices("2,-1,3", 1) == ["2"]


# ---- the choice


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("used", "device"),
    [({0}, "1"), ({0, 1, 2}, "3"), ({1, 2}, "0"), ({2, 3}, "0"), ({0, 2}, "1")],
)
def test_the_first_device_the_target_does_not_use_is_the_drafts(
    wanted: str, used: set[int], device: str
) -> None:
    assert place(wanted, FOUR, used, None) == Placement(device, shared=False)


def test_the_entry_of_the_setting_is_handed_on_not_the_index() -> None:
    assert place("auto", ["5", "GPU-7"], {0}, None) == Placement("GPU-7", shared=False)
    assert place("cuda:1", ["5", "GPU-7"], {0}, None) == Placement("GPU-7", shared=False)


def test_without_a_free_device_the_draft_shares_the_targets_first() -> None:
    assert place("auto", FOUR, {0, 1, 2, 3}, None) == Placement("0", shared=True)
    assert place("auto", ["7"], {0}, None) == Placement("7", shared=True)


def test_of_a_list_of_devices_the_draft_gets_the_one_left_over() -> None:
    assert place("auto", FOUR, {1, 2}, {1, 2, 3}) == Placement("3", shared=False)


def test_devices_that_the_engine_was_not_offered_are_left_to_others() -> None:
    assert place("auto", FOUR, {2, 3}, {2, 3}) == Placement("2", shared=True)
    assert place("cuda:0", FOUR, {2, 3}, {2, 3}) == Placement("0", shared=False)


def test_an_index_counts_what_the_engine_sees_and_may_be_the_targets() -> None:
    assert place("cuda:3", FOUR, {0, 1}, None) == Placement("3", shared=False)
    assert place("cuda:1", FOUR, {0, 1}, None) == Placement("1", shared=True)


def test_a_device_that_the_drafts_worker_does_not_see_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'draft_device' = 'cuda:2': the worker .* sees 2 CUDA"):
        place("cuda:2", ["4", "5"], {0}, None)


# ---- the target's workers on the draft's node


@pytest.mark.parametrize(
    ("local_world_size", "assigned", "workers"),
    [
        (4, None, 4),  # devices in turn; of several nodes only this one's workers
        (2, [4, 5], 2),
        (2, [4, 5, 6], 2),  # --device-ids with one to spare
        (8, [0, 1, 2, 3], 4),  # Ray on two nodes counts all workers
    ],
)
def test_the_targets_devices_are_those_of_its_workers_on_this_node(
    local_world_size: int, assigned: list[int] | None, workers: int
) -> None:
    assert workers_here(local_world_size, assigned) == workers


class FourDevices(CpuPlatform):
    """vLLM's own mapping of device numbers on a machine with four devices."""

    device_name = "cuda"
    device_control_env_var = "CUDA_VISIBLE_DEVICES"

    def is_cpu(self) -> bool:
        return False

    @classmethod
    def device_count(cls) -> int:
        return len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(","))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("vllm.platforms._current_platform", FourDevices())
    monkeypatch.setattr(interface, "_assigned_physical_gpu_ids", None)
    monkeypatch.setattr(placement.logger, "propagate", True)
    return monkeypatch


def parallel(machine: pytest.MonkeyPatch, assigned: list[int] | None = None, **values: Any) -> Any:
    """A target's parallel configuration, in a worker to which vLLM has assigned its devices."""
    config = ParallelConfig()
    config.assigned_physical_gpu_ids = assigned
    for name, value in values.items():
        setattr(config, name, value)
    machine.setattr(interface, "_assigned_physical_gpu_ids", assigned)
    return config


def test_workers_take_the_visible_devices_in_turn(machine: pytest.MonkeyPatch) -> None:
    assert place_draft("auto", parallel(machine, world_size=2)) == Placement("2", shared=False)
    machine.setenv("CUDA_VISIBLE_DEVICES", "6,4,2")
    assert place_draft("auto", parallel(machine, world_size=2)) == Placement("2", shared=False)


def test_of_two_nodes_only_this_ones_workers_count(machine: pytest.MonkeyPatch) -> None:
    config = parallel(machine, world_size=6, nnodes=2)
    assert config.local_world_size == 3
    assert place_draft("auto", config) == Placement("3", shared=False)


def test_device_ids_decide_what_the_target_uses(
    machine: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert place_draft("auto", parallel(machine, [1, 3], world_size=2)).device == "1"
    assert "shares CUDA device 1" in caplog.text
    assert "--device-ids" in caplog.text
    spare = parallel(machine, [1, 3, 0], world_size=2)
    assert place_draft("auto", spare) == Placement("0", shared=False)
    machine.setenv("CUDA_VISIBLE_DEVICES", "3,2,1")
    shared = parallel(machine, [3, 2], world_size=2)
    assert place_draft("cuda:1", shared) == Placement("2", shared=True)
    assert place_draft("cuda:2", shared) == Placement("1", shared=False)


def test_beside_rays_workers_the_draft_takes_a_free_device_and_says_so(
    machine: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = parallel(machine, [2, 3], world_size=4, distributed_executor_backend="ray")
    assert place_draft("auto", config) == Placement("0", shared=False)
    assert "Ray does not know" in caplog.text


# ---- what is known before the engine starts


@pytest.mark.parametrize("platform", ["rocm", "xpu", "tpu"])
def test_other_platforms_are_refused(platform: str) -> None:
    with pytest.raises(ValueError, match=rf"^ssd: vLLM's platform '{platform}' is not supported"):
        check_device("auto", platform, 1)


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:0", "cuda:1"])
def test_a_device_that_exists_is_accepted(wanted: str) -> None:
    check_device(wanted, "cuda", 2)


@pytest.mark.parametrize(
    ("wanted", "platform", "count", "said"),
    [
        ("cuda", "cpu", None, "this vLLM is built for CPU; use 'cpu'"),
        ("cpu", "cuda", 2, "built for CUDA and has no CPU kernels; use a CUDA device"),
        ("cuda:2", "cuda", 2, "sees 2 CUDA devices, and they count from cuda:0"),
        ("cuda:1", "cuda", 1, "sees 1 CUDA device, and they count from cuda:0"),
    ],
)
def test_a_device_that_does_not_exist_is_refused(
    wanted: str, platform: str, count: int | None, said: str
) -> None:
    with pytest.raises(ValueError, match=rf"^ssd: option 'draft_device' = '{wanted}': .*{said}"):
        check_device(wanted, platform, count)


def test_devices_of_another_machine_are_not_checked_here() -> None:
    check_device("cuda:7", "cuda", None)
