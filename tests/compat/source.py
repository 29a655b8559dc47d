"""vLLM's names, read from its source: nothing of it is imported, so no version has to be installed.

Finds what :mod:`vllm_ssd.compat` finds of the installed one. What only running code could tell (the
platform, the class of an attribute that a factory makes) is said in :data:`MADE`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from vllm_ssd import compat
from vllm_ssd.hooks import Names

_V1 = "vllm.v1.worker."
MADE = {
    "vllm.platforms:current_platform": "vllm.platforms.interface:Platform",
    f"{_V1}gpu_model_runner:GPUModelRunner.attn_groups": f"{_V1}utils:AttentionGroup",
    f"{_V1}gpu_model_runner:GPUModelRunner.model": (
        "vllm.model_executor.models.interfaces_base:VllmModelForTextGeneration"
    ),
    f"{_V1}gpu_input_batch:InputBatch.block_table": f"{_V1}block_table:BlockTable",
}
"""What stands behind an attribute where its source does not say."""
DELEGATED = {"vllm.platforms.current_platform.device_count": "__getattr__"}
"""Members that are torch's, by which member of vLLM's."""


class Thing(NamedTuple):
    """A definition in the source."""

    module: str
    node: ast.AST

    @property
    def place(self) -> str:
        """As in the lists of names."""
        return f"{self.module}:{getattr(self.node, 'name', '')}"


class Source:
    """The source of one version.

    Args:
        root: the folder of the package ``vllm``.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def moved(self, names: Names) -> list[str]:
        """The names that are not as listed, with their parameters if those differ."""
        found: list[str] = []
        for place, listed in names.items():
            module, _, name = place.partition(":")
            if self.module(module) is None:
                found.append(module)
                continue
            owner = self._find(place)
            if name and owner is None:
                found.append(f"{module}.{name}")
                continue
            for member, parameters in compat.members(listed):
                full = f"{place.replace(':', '.')}.{member}"
                if name:
                    assert owner is not None
                    thing, is_there = self.member(owner, DELEGATED.get(full, member))
                else:
                    thing = self.resolve(module, member)
                    is_there = thing is not None or self.module(f"{module}.{member}") is not None
                if not is_there:
                    found.append(full)
                elif parameters:
                    theirs = self.parameters(thing, bool(name))
                    if not compat.takes(theirs, parameters):
                        found.append(f"{full}({', '.join(theirs)})")
        return found

    def lacking(self, place: str, paths: tuple[str, ...]) -> list[str]:
        """The paths of attributes that instances of a class do not have."""
        return [path for path in paths if not self._has_path(place, path)]

    @cache  # noqa: B019 (few live, as long as the tests)
    def module(self, name: str) -> ast.Module | None:
        """A module's tree."""
        at = self._root.parent.joinpath(*name.split("."))
        for path in (at.with_suffix(".py"), at / "__init__.py"):
            if path.is_file():
                return ast.parse(path.read_text())
        return None

    @cache  # noqa: B019
    def resolve(self, module: str, name: str) -> Thing | None:
        """What a module calls by a name, wherever it is from."""
        tree = self.module(module)
        if tree is None:
            return None
        for node in _statements(tree.body):
            match node:
                case ast.FunctionDef() | ast.ClassDef() if node.name == name:
                    return Thing(module, node)
                case ast.Assign() if any(name in _targets(t) for t in node.targets):
                    return Thing(module, node)
                case ast.AnnAssign(target=ast.Name(id=called)) if called == name:
                    return Thing(module, node)
                case ast.ImportFrom():
                    for alias in node.names:
                        if (alias.asname or alias.name) == name:
                            return self._imported(module, node, alias.name)
        return self._lazily(module, tree, name)

    def member(self, owner: Thing, name: str) -> tuple[Thing | None, bool]:
        """A member of a class or of what is said to stand behind a name, and if there is one."""
        for cls in self._lineage(owner):
            assert isinstance(cls.node, ast.ClassDef)
            for node in _statements(cls.node.body):
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return Thing(cls.module, node), True
            if name in _attributes(cls.node):
                return None, True
        return None, False

    def parameters(self, thing: Thing | None, of_class: bool) -> list[str]:
        """Of a function, or of the call that makes an instance of a class.

        Args:
            thing: what is called.
            of_class: it is a member of a class.
        """
        assert thing is not None, "it is called, but is no function"
        node = thing.node
        if isinstance(node, ast.FunctionDef):
            names = _arguments(node)
            bound = any(ast.unparse(each) == "classmethod" for each in node.decorator_list)
            return names[1:] if of_class and bound else names
        assert isinstance(node, ast.ClassDef), ast.dump(node)[:80]
        fields: list[str] = []
        for cls in self._lineage(thing):
            assert isinstance(cls.node, ast.ClassDef)
            for inner in _statements(cls.node.body):
                if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                    return _arguments(inner)[1:]
            fields = _fields(cls.node) + fields  # a dataclass, or a named tuple
        return fields

    def _find(self, place: str) -> Thing | None:
        module, _, name = MADE.get(place, place).partition(":")
        return self.resolve(module, name) if name else None

    def _lineage(self, thing: Thing) -> Iterator[Thing]:
        """A class and those it is made from, as far as they are vLLM's."""
        if not isinstance(thing.node, ast.ClassDef):
            return
        yield thing
        for base in thing.node.bases:
            if isinstance(base, ast.Subscript):
                base = base.value
            if isinstance(base, ast.Name):
                above = self.resolve(thing.module, base.id)
                if above is not None:
                    yield from self._lineage(above)

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> Thing | None:
        source = node.module or ""
        if node.level:
            package = module.split(".")
            if not (self._root.parent.joinpath(*package) / "__init__.py").is_file():
                package.pop()
            above = package[: len(package) - node.level + 1]
            source = ".".join([*above, source] if source else above)
        found = self.resolve(source, name)
        if found is None and self.module(f"{source}.{name}") is None and _is_ours(source):
            return None
        return found or Thing(source, node)  # a module, or not vLLM's

    def _lazily(self, module: str, tree: ast.Module, name: str) -> Thing | None:
        """A name that the module's ``__getattr__`` makes, if it is named there."""
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Constant) and inner.value == name:
                        return Thing(module, node)
        return None

    def _has_path(self, place: str, path: str) -> bool:
        owner = self._find(place)
        parts = path.split(".")
        for index, part in enumerate(parts):
            name = part.split("[")[0]
            if owner is None or not self.member(owner, name)[1]:
                return False
            if index + 1 < len(parts):
                behind = self._behind(owner, name)
                assert behind is not None, f"say in MADE what {owner.place}.{name} is"
                owner = behind
        return True

    def _behind(self, owner: Thing, name: str) -> Thing | None:
        """The class of an attribute: by :data:`MADE`, or by what is assigned to it."""
        for cls in self._lineage(owner):
            if f"{cls.place}.{name}" in MADE:
                return self._find(MADE[f"{cls.place}.{name}"])
            for node in ast.walk(cls.node):
                made = _assigned(node, name)
                if (
                    isinstance(made, ast.Call)
                    and isinstance(made.func, ast.Attribute)
                    and ast.unparse(made.func.value) == "self"
                ):
                    method, _ = self.member(owner, made.func.attr)
                    made = None if method is None else getattr(method.node, "returns", None)
                for called in ast.walk(made) if made is not None else ():
                    if isinstance(called, ast.Name):
                        found = self.resolve(cls.module, called.id)
                        if found is not None and isinstance(found.node, ast.ClassDef):
                            return found
        return None


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == "vllm"


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module or class, with those under conditions; none for type checkers alone, but
    for the annotated ones: ``vllm.envs`` has its names so."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            inner = [*_statements(node.body)]
            if ast.unparse(node.test) == "TYPE_CHECKING":
                inner = [each for each in inner if isinstance(each, ast.AnnAssign)]
            yield from inner
            yield from _statements(node.orelse)
        elif isinstance(node, ast.Try):
            yield from _statements(node.body)
            for handler in node.handlers:
                yield from _statements(handler.body)


def _targets(node: ast.expr) -> list[str]:
    return [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]


def _arguments(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    return [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _fields(node: ast.ClassDef) -> list[str]:
    return [
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign)
        and isinstance(each.target, ast.Name)
        and "ClassVar" not in ast.unparse(each.annotation)
        and "init=False" not in ast.unparse(each)
    ]


def _attributes(node: ast.ClassDef) -> set[str]:
    """Of the class, or of its instances: what is assigned anywhere in it."""
    found: set[str] = set()
    for each in _statements(node.body):
        if isinstance(each, ast.AnnAssign):
            found |= set(_targets(each.target))
        elif isinstance(each, ast.Assign):
            found |= {name for target in each.targets for name in _targets(target)}
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.ctx, ast.Store)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "self"
        ):
            found.add(inner.attr)
    return found


def _assigned(node: ast.AST, name: str) -> ast.expr | None:
    """What is assigned to ``self.name`` here, or its annotation."""
    match node:
        case ast.AnnAssign(target=ast.Name(id=called) | ast.Attribute(attr=called)):
            return node.annotation if called == name else None
        case ast.Assign(targets=[ast.Attribute(attr=called)], value=value):
            return value if called == name else None
    return None
