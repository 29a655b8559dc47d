"""Plain answers, and folders short enough for the paths of sockets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.robustness import harness
from tests.robustness.harness import Decoding
from tests.tiny_models import TinyModels

TEXTS = harness.prompts(3)
MAX_TOKENS = 48


@pytest.fixture(scope="session")
def expected(tiny_pair: TinyModels) -> list[list[int]]:
    """The answers of vLLM without speculation to ``TEXTS``."""
    with harness.running_engine(tiny_pair) as llm:
        return Decoding(llm, TEXTS, MAX_TOKENS).finish()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Of a module; pytest's own may be too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="ssd-") as folder:
        yield Path(folder)
