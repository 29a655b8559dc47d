"""A name that vLLM lacks is refused by that name."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.compat.listed import listed
from vllm_ssd import compat, hooks

# ---- vLLM lacks a name


def cases() -> Iterator[Any]:
    checks: list[tuple[Callable[[], None], hooks.Names]] = [
        (compat.check_hooks, hooks.TARGET),
        (compat.check_hooks, hooks.TARGET_ON_CPU),
        (compat.check_v2_hooks, hooks.TARGET_V2),
        (compat.check_draft, hooks.DRAFT),
        (compat.check_draft, hooks.DRAFT_PLANNING[0]),  # 0.32
    ]
    for check, names in checks:
        for place, entry in names.items():
            for member, _ in compat.members(entry):
                yield pytest.param(check, place, member, id=f"{place}.{member}")


class Without:
    """An object that lacks a member and has all others."""

    def __init__(self, whole: Any, member: str) -> None:
        self._whole, self._member = whole, member

    def __getattr__(self, name: str) -> Any:
        if name == self._member:
            raise AttributeError(name)
        return getattr(self._whole, name)


class WithoutInClass(type):
    """The class of a class that lacks a member and has all others."""

    def __getattribute__(cls, name: str) -> Any:
        lacks = type.__getattribute__(cls, "__dict__").get("lacks", ())
        if name in lacks:
            raise AttributeError(name)
        return type.__getattribute__(cls, name)


def without(whole: Any, place: str, member: str) -> Any:
    """``whole``, as if vLLM had renamed ``member``."""
    others = listed()[place] - {member}
    if not inspect.isclass(whole):
        return Without(whole, member)
    body = {name: inspect.getattr_static(whole, name) for name in others if hasattr(whole, name)}
    body["__annotations__"] = dict.fromkeys(others - body.keys(), "Any")
    body["lacks"] = (member,)
    if member != "__init__":
        body["__signature__"] = inspect.signature(whole)
    return WithoutInClass(whole.__name__, (), body)


@pytest.mark.parametrize(("check", "place", "member"), cases())
def test_a_renamed_name_of_vllm_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[], None], place: str, member: str
) -> None:
    module_name, _, object_name = place.partition(":")
    module = importlib.import_module(module_name)
    if object_name:
        stand_in = without(getattr(module, object_name), place, member)
        monkeypatch.setattr(module, object_name, stand_in)
    else:
        renamed = ModuleType(module_name)
        monkeypatch.setattr(renamed, "__getattr__", Without(module, member).__getattr__, False)
        monkeypatch.setitem(sys.modules, module_name, renamed)
    name = f"{module_name}.{object_name}.{member}".replace("..", ".")
    with pytest.raises(RuntimeError, match=rf"moved or changed {re.escape(name)}\b.* update one"):
        check()


def test_a_module_that_is_gone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.utils", None)
    with pytest.raises(RuntimeError, match=r"moved or changed vllm\.v1\.worker\.utils;"):
        compat.check_draft()


@pytest.mark.parametrize(
    "changed",
    [
        lambda kv_caches, num_blocks: None,
        lambda num_blocks, kv_caches, kv_cache_block_copies: None,
    ],
    ids=["fewer", "another order"],
)
def test_other_parameters_are_refused_with_those_found(
    monkeypatch: pytest.MonkeyPatch, changed: Callable[..., None]
) -> None:
    from vllm.v1.worker import utils

    monkeypatch.setattr(utils, "copy_kv_cache_blocks_inplace", changed)
    found = ", ".join(inspect.signature(changed).parameters)
    with pytest.raises(RuntimeError, match=rf"copy_kv_cache_blocks_inplace\({found}\)"):
        compat.check_draft()


def test_a_parameter_that_is_passed_by_name_must_have_that_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.worker import worker_base

    monkeypatch.setattr(worker_base, "WorkerWrapperBase", lambda rank: None)
    with pytest.raises(RuntimeError, match=r"worker_base\.WorkerWrapperBase\(rank\)"):
        compat.check_draft()


def test_names_of_the_next_minor_version_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """``get_kv_cache_configs`` has moved to a module of its own in 0.33."""
    from vllm.v1.core import kv_cache_utils

    def get_kv_cache_configs(
        vllm_config: Any, kv_cache_specs: Any, available_memory: Any, global_kv_cache_groups: Any
    ) -> None: ...

    planning: Any = ModuleType("vllm.v1.core.kv_cache_planning")
    planning.get_kv_cache_configs = get_kv_cache_configs
    planning.get_global_kv_cache_groups = lambda vllm_config, kv_cache_specs: None
    monkeypatch.delattr(kv_cache_utils, "get_kv_cache_configs")
    monkeypatch.setitem(sys.modules, "vllm.v1.core.kv_cache_planning", planning)
    compat.check_draft()


# ---- an instance lacks an attribute


class Node(SimpleNamespace):
    """An attribute that can be indexed as well."""

    def __getitem__(self, index: int) -> Node:
        return self


def tree(paths: list[str]) -> Node:
    root = Node()
    for path in paths:
        at = root
        for part in re.sub(r"\[\d\]", "", path).split("."):
            if not hasattr(at, part):
                setattr(at, part, Node())
            at = getattr(at, part)
    return root


INSTANCES: dict[Callable[[Any], None], tuple[str, ...]] = {
    compat.check_worker: hooks.WORKER,
    compat.check_v2_worker: hooks.V2_WORKER,
    compat.check_draft_runner: hooks.DRAFT_RUNNER,
}


@pytest.mark.parametrize(
    ("check", "path"),
    [(check, path) for check, paths in INSTANCES.items() for path in paths],
)
def test_an_attribute_that_vllm_has_renamed_is_refused_by_name(
    check: Callable[[Any], None], path: str
) -> None:
    paths = INSTANCES[check]
    check(tree(list(paths)))
    with pytest.raises(RuntimeError, match=rf"moved or changed \w+\.{re.escape(path)};"):
        check(tree([other for other in paths if other != path]))


def test_the_draft_process_can_report_what_is_missing() -> None:
    """Its server imports nothing of vLLM: a moved name is reported, and does not end the import."""
    code = "import sys, vllm_ssd.draft.server; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
