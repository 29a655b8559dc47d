"""Which CPU cores the target's threads and the draft run on: different ones, if there are two.

With worker processes vLLM binds the target's threads itself and leaves cores free; in-process
(``VLLM_ENABLE_V1_MULTIPROCESSING=0``) it binds nothing, so the plugin does.
"""

from __future__ import annotations

import logging
import os
import weakref
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vllm_ssd import affinity
from vllm_ssd.draft_checks import check_cores

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

logger = logging.getLogger("vllm.vllm_ssd")


Worker = TypeVar("Worker")


class Cores(NamedTuple):
    """A split of the cores."""

    target: list[int] | None
    """Where the target's threads are to be bound; ``None``: vLLM has bound them."""
    draft: list[int]


def take_cores(
    worker: Worker, wanted: list[int] | None, parallel: ParallelConfig
) -> tuple[list[int], weakref.finalize[..., Worker] | None]:
    """Split the cores, and keep the target's threads to theirs; called in its worker on CPU.

    Args:
        worker: the target's.
        wanted: the cores the user gave the draft (``draft_cpu_cores``).
        parallel: vLLM's.

    Returns:
        The draft's cores, and what undoes the binding, where there is one. That is also called when
        the worker is freed: an engine that fails to start is never shut down.

    Raises:
        ValueError: a core that this process may not use.
    """
    in_process = parallel.distributed_executor_backend == "uni"
    split = split_cores(wanted, in_process, parallel.world_size)
    if split.target is None or not bind_target(split.target):
        return split.draft, None
    return split.draft, weakref.finalize(worker, affinity.unbind)


def split_cores(wanted: list[int] | None, in_process: bool, num_workers: int = 1) -> Cores:
    """Decide where both run.

    Args:
        wanted: the cores the user gave the draft (``draft_cpu_cores``).
        in_process: the target runs in the caller's process, unbound.
        num_workers: of the target.

    Raises:
        ValueError: a core that this process may not use.
    """
    # A worker process is bound already; its parent is not.
    allowed = (
        affinity.available_cores() if in_process else sorted(os.sched_getaffinity(os.getppid()))
    )
    check_cores(wanted, allowed)
    if in_process:
        draft = wanted or allowed[-1:]
        target = [core for core in allowed if core not in draft] or allowed
        if set(target) & set(draft):
            _warn_shared(draft)
        return Cores(target, draft)
    bound = _bound_by_vllm()
    taken = bound | _siblings(bound)
    free = [core for core in allowed if core not in taken]
    if num_workers > 1:
        # A worker finds only its own cores in its environment; by default each has a NUMA node.
        nodes = {_node(core) for core in bound}
        free = [core for core in free if _node(core) in nodes]
    draft = wanted or free or allowed[-1:]
    if set(draft) & taken:
        _warn_shared(draft)
    return Cores(None, draft)


def bind_target(cores: list[int]) -> bool:
    """Keep the target's threads, which run in this process, to ``cores``.

    Returns:
        Whether that was done. Not after an earlier engine in this process, even one without the
        plugin, that has more threads: vLLM then keeps their number, because its cached matrix
        kernels give wrong results with weights laid out for another number; and threads that share
        a core would spin while they wait for each other.
    """
    import torch

    torch.set_num_threads(len(cores))
    threads = torch.get_num_threads()
    if threads > len(cores):
        logger.warning(
            "ssd: this process has had an engine with %d threads, so the draft shares a core with "
            "this one's; start it in a new process, or set OMP_NUM_THREADS=%d before",
            threads,
            len(cores),
        )
        return False
    affinity.bind(cores)
    return True


def _bound_by_vllm() -> set[int]:
    """The cores vLLM gave to the target's workers."""
    from vllm import envs
    from vllm.utils.cpu_resource_utils import parse_id_list

    setting = envs.VLLM_CPU_OMP_THREADS_BIND
    if setting == "nobind":
        return set()
    if setting == "auto":
        return _own_binding()
    return {core for part in setting.split("|") for core in parse_id_list(part)}


def _own_binding() -> set[int]:
    """The cores of this worker, from vLLM's settings of its OpenMP runtime."""
    for name in ("GOMP_CPU_AFFINITY", "OMP_PLACES", "KMP_AFFINITY"):
        value = os.environ.get(name)
        if value:
            text = value.split("proclist=")[-1]
            numbers = "".join(c if c.isdigit() else " " for c in text).split()
            return {int(number) for number in numbers}
    return set(os.sched_getaffinity(0))


def _siblings(cores: set[int]) -> set[int]:
    """Logical cores that share a physical one with ``cores``."""
    found: set[int] = set()
    for core in cores:
        path = f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue  # no topology in this sandbox: every core counts for itself
        for part in text.split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found


def _node(core: int) -> str:
    """The NUMA node of a core; "" where the system does not show it."""
    try:
        names = os.listdir(f"/sys/devices/system/cpu/cpu{core}")
    except OSError:
        return ""
    return next((name for name in names if name.startswith("node")), "")


def _warn_shared(draft: list[int]) -> None:
    logger.warning(
        "ssd: the draft shares cores %s with the target; both will be slower. "
        "Give vLLM fewer cores (VLLM_CPU_OMP_THREADS_BIND) or set draft_cpu_cores",
        draft,
    )
