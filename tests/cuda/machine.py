"""What there is here: devices, driver, versions; and what of this program that rules out."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "vllm-ssd")
_INVARIANT_FROM = (8, 0)
"""The compute capability from which ``VLLM_BATCH_INVARIANT`` is used."""


class Device(NamedTuple):
    """A CUDA device."""

    name: str
    capability: tuple[int, int]
    total_bytes: int

    def __str__(self) -> str:
        major, minor = self.capability
        size = f"{self.total_bytes / 2**30:.0f} GiB"
        return f"{self.name} ({size}, compute capability {major}.{minor})"


class Machine(NamedTuple):
    """The machine and what is installed."""

    devices: list[Device]
    """Those that are visible; none without CUDA."""
    facts: dict[str, str]
    """For the report."""
    lacks_v2: str
    """Why vLLM's V2 runner cannot run here; empty if it can."""

    @property
    def has_cuda(self) -> bool:
        """Whether there is a device."""
        return bool(self.devices)

    @property
    def has_batch_invariance(self) -> bool:
        """Whether vLLM can compute a text in the same way whatever the shape of the batch."""
        return all(device.capability >= _INVARIANT_FROM for device in self.devices)


def look_around() -> Machine:
    """The machine, without a context on any device.

    Raises:
        RuntimeError: there is no vLLM.
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    from vllm_ssd.compat import vllm_version

    devices = []
    facts = {
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "vLLM": " ".join(vllm_version()),
        "packages": ", ".join(filter(None, map(_version, _PACKAGES))),
        "commit": _commit(),
    }
    if current_platform.is_cuda():
        for index in range(current_platform.device_count()):
            capability = current_platform.get_device_capability(index)
            devices.append(
                Device(
                    current_platform.get_device_name(index),
                    (capability.major, capability.minor),
                    current_platform.get_device_total_memory(index),
                )
            )
        facts["devices"] = "; ".join(map(str, devices))
        facts["driver"] = _driver()
    else:
        facts["devices"] = f"no CUDA device; {_cpu()}"
    lacks_v2 = "" if HAS_TRITON else "vLLM's V2 runner needs Triton, which is not there for CPUs"
    return Machine(devices, facts, lacks_v2)


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _driver() -> str:
    import torch
    from vllm.utils.import_utils import import_pynvml

    nvml = import_pynvml()
    nvml.nvmlInit()
    version = nvml.nvmlSystemGetDriverVersion()
    nvml.nvmlShutdown()
    return f"{version}, torch built for CUDA {torch.version.cuda}"


def _cpu() -> str:
    from vllm_ssd.affinity import available_cores

    return f"{platform.machine()}, {len(available_cores())} cores"
