"""The names we use are in every version of vLLM that is supported, also where it is not installed.

Versions that are not installed come as source from the package index that pip uses.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import vllm

from tests.compat.source import Source
from vllm_ssd import compat, hooks

INSTALLED = Source(Path(vllm.__file__).parent)
INSTANCES = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (hooks.WORKER, hooks.DRAFT_RUNNER),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": (hooks.V2_WORKER,),
}
"""Attributes of instances, by the class of the runner."""
WORKER = "vllm.v1.worker.gpu_worker:Worker"
NAMES = (hooks.TARGET, hooks.TARGET_ON_CPU, hooks.TARGET_V2, hooks.DRAFT)
PLATFORM = "manylinux_2_28_x86_64"


def missing(source: Source) -> list[str]:
    """What a version lacks of all that we use."""
    found = [name for names in NAMES for name in source.moved(names)]
    ways = [source.moved(names) for names in hooks.DRAFT_PLANNING]
    if all(ways):
        found += ways[0]
    for runner, lists in INSTANCES.items():
        for paths in lists:
            ours = tuple(path.removeprefix("model_runner.") for path in paths)
            of_worker = tuple(
                path for path in paths if paths is not hooks.DRAFT_RUNNER and path in ours
            )
            of_runner = tuple(path for path in ours if path not in of_worker)
            found += source.lacking(WORKER, of_worker) + source.lacking(runner, of_runner)
    return found


def fetch(minor: tuple[int, int], folder: Path) -> None:
    """The Python files of a version's wheel, whatever it was built for."""
    with tempfile.TemporaryDirectory(dir=folder) as wheels:
        options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--quiet"]
        wanted = f"vllm=={minor[0]}.{minor[1]}.*"
        command = [sys.executable, "-m", "pip", "download", *options, f"--platform={PLATFORM}"]
        done = subprocess.run(
            [*command, "--dest", wheels, wanted], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"pip has no wheel of {wanted} here: {done.stderr.strip()[-300:]}")
        (wheel,) = Path(wheels).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            files = [each for each in archive.namelist() if each.endswith(".py")]
            archive.extractall(folder, files)
    (folder / "complete").touch()


@pytest.fixture(scope="module", params=compat.SUPPORTED, ids=lambda minor: f"{minor[0]}.{minor[1]}")
def source(request: pytest.FixtureRequest) -> Source:
    """The source of a supported version, kept for the next run."""
    minor: tuple[int, int] = request.param
    if compat.vllm_version()[1].startswith(f"{minor[0]}.{minor[1]}."):
        return INSTALLED
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "vllm-ssd" / "sources" / f"vllm-{minor[0]}.{minor[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "complete").exists():
        fetch(minor, folder)
    return Source(folder / "vllm")


@pytest.mark.slow
def test_it_has_every_name_that_we_use(source: Source) -> None:
    assert missing(source) == []


@pytest.mark.parametrize(
    ("place", "listed", "moved"),
    [
        ("vllm.v1.nowhere", "anything", "vllm.v1.nowhere"),
        ("vllm.config", "NoConfig", "vllm.config.NoConfig"),
        ("vllm.config:NoConfig", "a", "vllm.config.NoConfig"),
        ("vllm.config:CacheConfig", "no_size", "vllm.config.CacheConfig.no_size"),
        ("vllm.platforms:current_platform", "is_toaster", "current_platform.is_toaster"),
        ("vllm.envs", "VLLM_NOTHING", "vllm.envs.VLLM_NOTHING"),
        (
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
            "add_requests(self step)",
            "GPUModelRunner.add_requests(self, scheduler_output)",
        ),
        (
            "vllm.forward_context",
            "BatchDescriptor(num_reqs)",
            "vllm.forward_context.BatchDescriptor(num_tokens, ",
        ),
        (
            "vllm.v1.worker.worker_base",
            "WorkerWrapperBase(| rank)",
            "worker_base.WorkerWrapperBase(rpc_rank, ",
        ),
    ],
)
def test_a_name_that_has_moved_is_found(place: str, listed: str, moved: str) -> None:
    (found,) = INSTALLED.moved({place: listed})
    assert moved in found


@pytest.mark.parametrize(
    "path", ["req_states.nothing", "no_states.total_len", "req_states.total_len.tpu"]
)
def test_an_attribute_that_instances_lack_is_found(path: str) -> None:
    runner = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
    there = "req_states.total_len.gpu"
    assert INSTALLED.lacking(runner, (path, there)) == [path]
