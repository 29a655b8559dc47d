"""Plain answers, and one server for the tests that do not end it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.robustness import harness
from tests.robustness.harness import Decoding
from tests.shared.servers import Server
from tests.tiny_models import TinyModels

TEXTS = harness.prompts(3)
MAX_TOKENS = 48


@pytest.fixture(scope="session")
def expected(tiny_pair: TinyModels) -> list[list[int]]:
    """The answers of vLLM without speculation to ``TEXTS``."""
    with harness.running_engine(tiny_pair) as llm:
        return Decoding(llm, TEXTS, MAX_TOKENS).finish()


@pytest.fixture(scope="package")
def folder() -> Iterator[Path]:
    """For sockets; pytest's own may be too long for these."""
    with tempfile.TemporaryDirectory(prefix="ssd-") as folder:
        yield Path(folder)


@pytest.fixture(scope="package")
def server(tiny_pair: TinyModels, folder: Path) -> Iterator[Server]:
    """A server whose draft is the target, so that a look-up in time is a hit."""
    server = Server(tiny_pair.itself, f"unix:{folder}/draft", folder)
    server.start_and_wait()
    try:
        yield server
    finally:
        server.end_anyhow()
