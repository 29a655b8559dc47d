"""What all tests share: vLLM's environment, and models small enough to start in seconds."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny_models import TinyModels, tiny_models
from vllm_ssd.cli.models import DemoModels, demo_models

# vLLM reads these when it is first imported, which no import above does. What is set already stays.
for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the test's own process starts in 2 s
    "OMP_NUM_THREADS": "1",  # the first engine decides it for all engines of a process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

# A slow machine is not a failure.
settings.register_profile("vllm-ssd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vllm-ssd")


@pytest.fixture(scope="session")
def tiny_pair() -> TinyModels:
    """A random target and three drafts for it, made once and kept in the cache folder."""
    return tiny_models()


@pytest.fixture(scope="session")
def demo_pair() -> DemoModels:
    """SmolLM2-135M-Instruct and its draft, fetched and converted if they are not there yet."""
    return demo_models()


@pytest.fixture
def quantize(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file ``examples/distill/quantize.py``."""
    folder = Path(__file__).resolve().parents[1] / "examples" / "distill"
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("quantize")


@pytest.fixture
def int8_draft(quantize: Any, tiny_pair: TinyModels, tmp_path: Path) -> Path:
    """The folder of the tiny draft in int8."""
    folder = tmp_path / "int8"
    quantize.main(tiny_pair.draft, folder)
    return folder
