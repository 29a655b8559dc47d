"""Engines with vLLM's V2 runner and SSD answer as plain V2 does, and speculate at that."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.harness import Engine, Job
from tests.tiny_models import TinyModels
from tests.v2.engines.harness import WORKLOADS, Answers, answers, drafts_of, job, start
from vllm_ssd import stats_file

SCARCE: dict[str, Any] = {"num_gpu_blocks_override": 9, "max_model_len": 128}
"""Fewer KV blocks of 32 tokens than the requests fill: some are preempted."""


@pytest.fixture(scope="module")
def itself(
    tiny_pair: TinyModels, asynchronous: bool, expected: dict[str, Answers]
) -> Iterator[Engine]:
    """An engine that is its own draft; after the plain one, whose end would disturb it."""
    engine = start(tiny_pair, "itself", asynchronous)
    yield engine
    engine.close()


@pytest.mark.slow
def test_plain_v2_answers_as_plain_v1_does(
    expected: dict[str, Answers], expected_of_v1: dict[str, Answers]
) -> None:
    assert expected == expected_of_v1


@pytest.mark.parametrize("workload", WORKLOADS)
def test_it_answers_as_plain_v2_does(
    itself: Engine, expected: dict[str, Answers], workload: str
) -> None:
    answered, grown = answers(itself, WORKLOADS[workload])
    assert answered == expected[workload]
    print(workload, {name: value for name, value in grown.items() if value})
    assert grown["hits"] > 0
    assert grown["accepted_branch"] > 0
    if workload in ("plain", "chunks"):
        # Without tokens that only the target is kept from, the draft is always right.
        assert grown["accepted_branch"] >= 0.95 * grown["drafted_branch"]


def test_the_counters_reach_the_servers_process(itself: Engine) -> None:
    reader = stats_file.Reader()
    try:
        _, grown = answers(itself, WORKLOADS["plain"])
        expected = itself.stats()["hits"]
        deadline = time.monotonic() + 10.0
        while (snapshot := reader.read()) is None or snapshot.counters["hits"] < expected:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        reader.close()
    assert grown["hits"] > 0
    assert snapshot.counters["draft_up"] == 1.0
    assert sum(snapshot.depths) == snapshot.counters["hits"]


def test_sampled_requests_run_beside_greedy_ones(
    itself: Engine, expected: dict[str, Answers]
) -> None:
    greedy = WORKLOADS["plain"]
    sampled = [job(index, temperature=0.8, seed=index) for index in range(2)]
    answered, _ = answers(itself, [*greedy, *sampled])
    assert answered[: len(greedy)] == expected["plain"]
    assert all(len(answer.tokens) == 24 for (answer,) in answered[len(greedy) :])


def test_an_aborted_request_disturbs_no_other(itself: Engine, expected: dict[str, Answers]) -> None:
    aborted = Job([1, 90, 91, 92], job(0, tokens=200).params, abort_after=5)
    answered, _ = answers(itself, [*WORKLOADS["plain"], aborted])
    assert answered[:-1] == expected["plain"]


def test_without_the_draft_decoding_goes_on_and_another_is_started(
    itself: Engine, expected: dict[str, Answers]
) -> None:
    thread = drafts_of(itself).thread
    os.kill(thread.ask(lambda: thread._client.link.pid), signal.SIGKILL)
    assert answers(itself, WORKLOADS["plain"])[0] == expected["plain"]
    deadline = time.monotonic() + 60.0
    while not itself.stats()["draft_up"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    answered, grown = answers(itself, WORKLOADS["plain"])
    assert answered == expected["plain"]
    assert itself.stats()["restarts"] >= 1
    assert grown["hits"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["near", "random"])
def test_a_draft_that_is_wrong_changes_nothing(
    tiny_pair: TinyModels, asynchronous: bool, expected: dict[str, Answers], draft: str
) -> None:
    engine = start(tiny_pair, draft, asynchronous)
    try:
        answered, grown = answers(engine, WORKLOADS["plain"])
    finally:
        engine.close()
    assert answered == expected["plain"]
    # Of a random draft's nothing is right, unless by chance.
    assert grown["look_ups" if draft == "random" else "tokens_accepted"] > 0
    print({name: value for name, value in grown.items() if value})


@pytest.mark.slow
def test_requests_that_are_preempted_come_back(tiny_pair: TinyModels, asynchronous: bool) -> None:
    jobs = [Job([1, 20 + index, *range(60, 95)], job(0, tokens=60).params) for index in range(4)]
    plain = start(tiny_pair, None, asynchronous, **SCARCE)
    try:
        expected = plain.run(jobs)
    finally:
        plain.close()
    engine = start(tiny_pair, "itself", asynchronous, **SCARCE)
    try:
        answered, grown = answers(engine, jobs)
        preempted = engine.metric("num_preemptions")
    finally:
        engine.close()
    assert preempted > 0
    assert answered == expected
    assert grown["hits"] > 0


@pytest.mark.slow
def test_after_a_lost_outcome_texts_are_right_and_new_requests_are_drafted_for(
    tiny_pair: TinyModels, asynchronous: bool, expected: dict[str, Answers]
) -> None:
    engine = start(tiny_pair, "itself", asynchronous, strict=False)
    try:
        readback = drafts_of(engine).readback
        deliver = readback._deliver

        def lose(*outcome: Any) -> None:
            readback._deliver = deliver
            raise OSError("an outcome is lost")

        readback._deliver = lose
        assert engine.run(WORKLOADS["plain"]) == expected["plain"]
        before = engine.stats()
        assert engine.run(WORKLOADS["plain"]) == expected["plain"]
        after = engine.stats()
    finally:
        engine.close()
    assert after["errors"] == after["texts_lost"] == 1
    assert after["misses_cannot_draft"] == before["misses_cannot_draft"] > 0
    assert after["hits"] > before["hits"]
