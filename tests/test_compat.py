"""Every name of vLLM that our code uses is listed, and refused by name where vLLM lacks it."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_ssd import compat

PACKAGE = Path(compat.__file__).parent
LISTS = (
    compat.TARGET,
    compat.TARGET_ON_CPU,
    compat.TARGET_V2,
    compat.DRAFT,
    *compat.DRAFT_PLANNING,
)
PATHS = {"worker": (*compat.WORKER, *compat.V2_WORKER), "runner": compat.DRAFT_RUNNER}


def listed() -> dict[str, set[str]]:
    """The members of each listed place."""
    found: dict[str, set[str]] = defaultdict(set)
    for names in LISTS:
        for place, entry in names.items():
            found[place] |= {member for member, _ in compat.members(entry)}
    return found


# ---- vLLM lacks a name


def cases() -> Iterator[Any]:
    checks: list[tuple[Callable[[], None], compat.Names]] = [
        (compat.check_hooks, compat.TARGET),
        (compat.check_hooks, compat.TARGET_ON_CPU),
        (compat.check_v2_hooks, compat.TARGET_V2),
        (compat.check_draft, compat.DRAFT),
        (compat.check_draft, compat.DRAFT_PLANNING[0]),  # 0.32
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
    compat.check_worker: compat.WORKER,
    compat.check_v2_worker: compat.V2_WORKER,
    compat.check_draft_runner: compat.DRAFT_RUNNER,
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


# ---- our code uses a name that is not listed

CALLED = {
    "EngineArgs": "vllm.engine.arg_utils:EngineArgs",
    "ModelConfig": "vllm.config:ModelConfig",
    "ParallelConfig": "vllm.config:ParallelConfig",
    "SchedulerOutput": "vllm.v1.core.sched.output:SchedulerOutput",
    "VllmConfig": "vllm.config:VllmConfig",
    "CUDAGraphMode": "vllm.config:CUDAGraphMode",
    "CUDAGraphMode | None": "vllm.config:CUDAGraphMode",
    "InputBatch": "vllm.v1.worker.gpu.input_batch:InputBatch",
    "NewRequestData | CachedRequestState": "vllm.v1.core.sched.output:NewRequestData",
    "_pool": "vllm.v1.core.block_pool:BlockPool",
    "cache_config": "vllm.config:CacheConfig",
    "compilation_config": "vllm.config:CompilationConfig",
    "descriptor": "vllm.forward_context:BatchDescriptor",
    "engine_args": "vllm.engine.arg_utils:EngineArgs",
    "load_config": "vllm.config:LoadConfig",
    "kv_cache_config": "vllm.v1.kv_cache_interface:KVCacheConfig",
    "model_config": "vllm.config:ModelConfig",
    "new": "vllm.v1.core.sched.output:NewRequestData",
    "parallel_config": "vllm.config:ParallelConfig",
    "sampling_params": "vllm.sampling_params:SamplingParams",
    "scheduler_config": "vllm.config:SchedulerConfig",
    "scheduler_output": "vllm.v1.core.sched.output:SchedulerOutput",
    "speculative_config": "vllm.config:SpeculativeConfig",
    "state": "vllm.v1.worker.gpu_input_batch:CachedRequestState",
    "vllm_config": "vllm.config:VllmConfig",
}
"""Names and annotations of vLLM's objects in our code, and where their members are listed."""


def members_of_instances() -> dict[str, set[str]]:
    """The listed members of each object on the way to a listed attribute, by the object's name."""
    found: dict[str, set[str]] = defaultdict(set)
    for root, paths in PATHS.items():
        for path in paths:
            parts = [root, *re.sub(r"\[\d\]", "", path).split(".")]
            for owner, member in itertools.pairwise(parts):
                found[owner].add(member)
    wrapped = ("worker_base:WorkerWrapperBase", "gpu_worker:Worker")
    found["worker"] |= {"worker"}.union(*(listed()[f"vllm.v1.worker.{name}"] for name in wrapped))
    del found["model"]  # our own has this name, too
    found["runner"] |= found["model_runner"]
    found["model_runner"] = found["runner"]
    return found


class Uses(ast.NodeVisitor):
    """Collects what a module uses of vLLM and the lists do not have."""

    def __init__(self) -> None:
        self.unlisted: set[str] = set()
        self._listed = listed()
        self._instances = members_of_instances()
        self._imported: dict[str, str] = {}
        self._annotated: dict[str, str] = {}

    def visit_If(self, node: ast.If) -> None:
        """What is imported for type checkers alone is not used."""
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if module.split(".")[0] != "vllm":
            return
        for alias in node.names:
            if alias.name not in self._listed[module]:
                self.unlisted.add(f"{module}.{alias.name}")
            inner = f"{module}.{alias.name}"
            place = inner if inner in self._listed else f"{module}:{alias.name}"
            self._imported[alias.asname or alias.name] = place

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "vllm":
                self.unlisted.add(f"import {alias.name}")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = dict(self._annotated)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            kind = ast.unparse(argument.annotation) if argument.annotation else ""
            if kind in CALLED:
                self._annotated[argument.arg] = CALLED[kind]
        self.generic_visit(node)
        self._annotated = before

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """A subclass of vLLM's worker: what it overrides, or calls of the class above."""
        if any(ast.unparse(base) == "PlatformWorker" for base in node.bases):
            from vllm.v1.worker.cpu_worker import CPUWorker

            known = self._listed["vllm.v1.worker.gpu_worker:Worker"]
            used = {d.name for d in node.body if isinstance(d, ast.FunctionDef)} & set(
                dir(CPUWorker)
            )
            for inner in ast.walk(node):
                if not isinstance(inner, ast.Attribute):
                    continue
                owner = ast.unparse(inner.value)
                if owner == "super()" or (owner == "self" and hasattr(CPUWorker, inner.attr)):
                    used.add(inner.attr)
            self.unlisted |= {f"PlatformWorker.{name}" for name in used - known}
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        owner = node.value
        while isinstance(owner, ast.Subscript):
            owner = owner.value
        if isinstance(owner, ast.Name):
            name = owner.id
            place = self._imported.get(name) or self._annotated.get(name) or CALLED.get(name)
        elif isinstance(owner, ast.Attribute):
            name = owner.attr
            place = CALLED.get(name)
        else:
            return
        if place in self._listed and node.attr not in self._listed[place]:
            self.unlisted.add(f"{place}.{node.attr}")
        instance = self._instances.get(name.removeprefix("_"))
        if place is None and instance is not None and node.attr not in instance:
            self.unlisted.add(f"{name}.{node.attr}")


def unlisted(source: str) -> set[str]:
    uses = Uses()
    uses.visit(ast.parse(source))
    return uses.unlisted


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name not in ("cli", "core")],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_our_code_uses_nothing_of_vllm_that_is_not_listed(path: Path) -> None:
    assert not unlisted(path.read_text())


def test_the_core_knows_nothing_of_vllm() -> None:
    for path in (PACKAGE / "core").glob("*.py"):
        assert not re.search(r"^\s*(from|import) vllm\b", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize(
    "source",
    [
        "from vllm.v1.worker.utils import bind_kv_cache",
        "import vllm.v1.worker.utils",
        "def f():\n    from vllm.v1 import serial_utils",
        "from vllm import envs\nenvs.VLLM_CACHE_ROOT",
        "from vllm.platforms import current_platform\ncurrent_platform.get_device_name()",
        "runner.execute_model_state",
        "self._runner.input_batch.num_reqs",
        "self._runner.input_batch.block_table[0].num_blocks_per_row",
        "self.model_runner.encoder_cache",
        "self._pool.reset_prefix_cache()",
        "self.vllm_config.lora_config",
        "def f(parallel: ParallelConfig):\n    parallel.node_rank",
        "class W(PlatformWorker):\n    def f(self):\n        super().add_lora(1)",
        "class W(PlatformWorker):\n    def add_lora(self, request): ...",
        "class W(PlatformWorker):\n    def f(self):\n        self.add_lora(1)",
        "def f(graphs: CUDAGraphMode | None):\n    graphs.decode_mode()",
        "vllm_config.load_config.device",
        "state.block_ids",
        "for new in step.scheduled_new_reqs:\n    new.block_ids",
    ],
)
def test_a_use_that_is_not_listed_is_found(source: str) -> None:
    assert unlisted(source)


def test_the_draft_process_can_report_what_is_missing() -> None:
    """Its server imports nothing of vLLM: a moved name is reported, and does not end the import."""
    code = "import sys, vllm_ssd.draft.server; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
