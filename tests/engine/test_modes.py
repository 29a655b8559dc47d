"""Both engine modes, tensor parallelism, and vLLM's own spelling without our method name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engine.harness import (
    LONG_WAIT_MS,
    Answer,
    Engine,
    Job,
    Spec,
    assert_identical,
    greedy,
    prompt,
    staggered,
)
from tests.tiny_models import TinyModels
from vllm_ssd.config import ADDITIONAL_CONFIG_KEY
from vllm_ssd.plugin import PROPOSER, WORKER

SPEC = Spec("itself", 4, {"max_wait_ms": LONG_WAIT_MS})
LENGTHS = (5, 90, 17, 150, 33, 8)


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    """Requests that arrive over time, one of them up to the model length."""
    return [*staggered(LENGTHS, every=3, params=greedy(40)), Job(prompt(240, 9), greedy(None))]


@pytest.fixture(scope="module")
def expected(models: TinyModels, jobs: list[Job]) -> list[list[Answer]]:
    """What plain vLLM answers."""
    with engine(models.target) as plain:
        return plain.run(jobs)


@pytest.fixture(scope="module", autouse=True)
def _alone(stop_pair: Callable[[], None]) -> None:
    # The engines of the other files keep this process, and so its children, to one core.
    stop_pair()


@contextmanager
def engine(model: object, **arguments: Any) -> Iterator[Engine]:
    """An engine for one test."""
    running = Engine(str(model), **arguments)
    try:
        yield running
    finally:
        running.close()


def plain_spelling(models: TinyModels) -> dict[str, Any]:
    """Engine arguments that need no patched method of vLLM's."""
    options = SPEC.speculative_config(models)
    del options["method"]
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": PROPOSER,
            "num_speculative_tokens": SPEC.depth,
        },
        "worker_cls": WORKER,
        "additional_config": {ADDITIONAL_CONFIG_KEY: options},
    }


def check(speculating: Engine, jobs: Sequence[Job], expected: Sequence[list[Answer]]) -> None:
    """Check that the text is identical, and that drafts were accepted."""
    assert_identical(jobs, expected, speculating.run(jobs))
    stats = speculating.stats()
    assert stats["tokens_drafted"] > 100
    assert stats["tokens_accepted"] > 0.9 * stats["tokens_drafted"]
    assert stats["misses_draft_down"] == stats["errors"] == stats["resyncs"] == 0


@pytest.mark.parametrize("worker_processes", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_the_plain_spelling(
    models: TinyModels,
    jobs: list[Job],
    expected: list[list[Answer]],
    monkeypatch: pytest.MonkeyPatch,
    worker_processes: str,
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", worker_processes)
    arguments = plain_spelling(models)
    # The core that vLLM leaves free, given explicitly: a worker process is bound to the others.
    last = max(os.sched_getaffinity(0))
    arguments["additional_config"][ADDITIONAL_CONFIG_KEY]["draft_cpu_cores"] = [last]
    with engine(models.target, **arguments) as speculating:
        check(speculating, jobs, expected)


@pytest.mark.slow
def test_tensor_parallelism(
    models: TinyModels, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    both: dict[str, Any] = {"tensor_parallel_size": 2}
    with engine(models.target, **both) as plain:
        expected = plain.run(jobs)
    method = SPEC.speculative_config(models)
    with engine(models.target, speculative_config=method, **both) as speculating:
        check(speculating, jobs, expected)
