"""The engine in a process of its own, its workers in others: answers are those of V1 and of V2."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.harness import difference
from tests.tiny_models import TinyModels
from tests.v2.engines.harness import WORKLOADS, Answers, running

pytestmark = pytest.mark.slow

PROCESSES: dict[str, dict[str, Any]] = {  # by the fixture that they need
    "in_processes": {"distributed_executor_backend": "mp"},
    "two_workers": {"tensor_parallel_size": 2},
}


@pytest.mark.parametrize("processes", PROCESSES)
def test_answers_are_those_of_plain_v1_and_v2(
    request: pytest.FixtureRequest,
    tiny_pair: TinyModels,
    expected: dict[str, Answers],
    expected_of_v1: dict[str, Answers],
    asynchronous: bool,
    processes: str,
) -> None:
    request.getfixturevalue(processes)
    with running(tiny_pair, "itself", asynchronous, **PROCESSES[processes]) as engine:
        for name, jobs in WORKLOADS.items():
            before = engine.stats()
            assert engine.run(jobs) == expected[name] == expected_of_v1[name]
            grown = difference(engine.stats(), before)
            print(name, {name: value for name, value in grown.items() if value})
            assert grown["tokens_accepted"] > 0
            assert grown["errors"] == grown["texts_lost"] == grown["misses_draft_down"] == 0
