"""Which files may know which: a front-end knows the shared part, never the other way round."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vllm_ssd

PACKAGE = Path(vllm_ssd.__file__).parent
FRONT_ENDS = ("v1", "v2")
SHARED = sorted(
    path
    for path in (PACKAGE / "target").rglob("*.py")
    if path.relative_to(PACKAGE / "target").parts[0] not in FRONT_ENDS
)
RUNNERS = ("vllm.v1.worker", "vllm.v1.sample", "vllm.v1.spec_decode", "vllm.v1.outputs")


def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere, also for type checkers alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.stem)
def test_what_front_ends_share_knows_no_runner(path: Path) -> None:
    ours = [f"vllm_ssd.target.{front_end}" for front_end in FRONT_ENDS]
    assert not [name for name in imported(path) if within(name, *RUNNERS, *ours)]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_front_ends_do_not_know_each_other(front_end: str) -> None:
    (other,) = set(FRONT_ENDS) - {front_end}
    for path in (PACKAGE / "target" / front_end).rglob("*.py"):
        found = [name for name in imported(path) if within(name, f"vllm_ssd.target.{other}")]
        assert not found, path


@pytest.mark.parametrize(
    ("layer", "above"),
    [
        ("core", ("wire", "draft", "target", "cli", "on_ray", "serving")),
        ("wire", ("draft", "target", "cli", "on_ray", "serving")),
        ("draft", ("target", "cli", "on_ray", "serving")),
        ("target", ("draft", "cli", "serving")),
    ],
)
def test_imports_go_one_way(layer: str, above: tuple[str, ...]) -> None:
    packages = [f"vllm_ssd.{package}" for package in above]
    for path in (PACKAGE / layer).rglob("*.py"):
        assert not [name for name in imported(path) if within(name, *packages)], path
