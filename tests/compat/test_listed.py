"""Every name of vLLM that our code uses is listed."""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.compat.listed import listed
from vllm_ssd import hooks

PACKAGE = Path(hooks.__file__).parent
PATHS = {"worker": (*hooks.WORKER, *hooks.V2_WORKER), "runner": hooks.DRAFT_RUNNER}
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
