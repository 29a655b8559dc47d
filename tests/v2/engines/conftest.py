"""What plain V2 answers, and what V1 does; a process has one runner, so V1 runs in another one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.robustness.harness import Decoding
from tests.tiny_models import TinyModels
from tests.v2.engines.harness import LONG, TEXTS, WORKLOADS, Answers, running
from tests.v2.interpreter import allow_async_scheduling


@pytest.fixture(scope="session", autouse=True)
def _async_on_cpu() -> None:
    allow_async_scheduling()


@pytest.fixture(scope="session")
def expected(tiny_pair: TinyModels) -> dict[str, Answers]:
    """What plain V2 answers; before any other engine, which the end of this one would disturb."""
    with running(tiny_pair, None, asynchronous=False) as engine:
        return {name: engine.run(jobs) for name, jobs in WORKLOADS.items()}


@pytest.fixture(scope="session")
def expected_texts(tiny_pair: TinyModels) -> list[list[int]]:
    """What plain V2 writes after ``TEXTS``, then after ``LONG``."""
    with running(tiny_pair, None, asynchronous=False, max_model_len=1024) as engine:
        texts = [text.prompt for text in TEXTS]
        found = Decoding(engine.llm, texts, TEXTS[0].tokens).finish()
        return found + Decoding(engine.llm, [LONG.prompt], LONG.tokens).finish()


@pytest.fixture(scope="session")
def expected_of_v1(
    tiny_pair: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answers]:
    """What plain V1 answers."""
    folder: Path = tmp_path_factory.mktemp("v1")
    asked, answered = folder / "asked", folder / "answered"
    asked.write_bytes(pickle.dumps((str(tiny_pair.target), WORKLOADS)))
    command = [sys.executable, "-m", "tests.v2.engines.plain_v1", str(asked), str(answered)]
    of_v2 = ("VLLM_USE_V2_MODEL_RUNNER", "TRITON_INTERPRET", "TORCHDYNAMO_DISABLE")
    environment = {name: value for name, value in os.environ.items() if name not in of_v2}
    subprocess.run(command, env=environment, check=True, timeout=300.0)
    found: dict[str, Answers] = pickle.loads(answered.read_bytes())
    return found


@pytest.fixture(scope="module", params=[pytest.param("sync", marks=pytest.mark.slow), "async"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "async")


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines start processes, their workers too, which have Triton interpreted."""
    here = Path(__file__).parents[1]
    path = [str(here / "site"), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


@pytest.fixture
def two_workers(in_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for two ranks: kept to a core each, they would leave the draft none of its own."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
