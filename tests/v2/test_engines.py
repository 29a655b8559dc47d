"""Engines with vLLM's V2 runner and SSD answer as plain V2 does, and speculate at that."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine.harness import Answer, Engine, Job
from tests.tiny_models import EOS, TinyModels
from tests.v2.interpreter import allow_async_scheduling
from vllm_ssd import stats_file

DEPTH = 3
Answers = list[list[Answer]]


def job(index: int, tokens: int = 24, **more: Any) -> Job:
    """A request of its own: prompts differ in length and content."""
    params = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, **more}
    prompt = [1, *range(10 + index, 16 + 4 * index)] * 2
    return Job(prompt, SamplingParams(**params), arrives=3 * index)


WORKLOADS: dict[str, list[Job]] = {
    "plain": [job(index) for index in range(3)],
    # They end, on tokens that greedy answers have or at once, while others go on.
    "ends": [
        *[job(index, ignore_eos=False, stop_token_ids=[*range(5, 300, 7)]) for index in range(3)],
        job(3, tokens=1),
        job(4, min_tokens=12, ignore_eos=False, stop_token_ids=[EOS, *range(5, 300, 3)]),
    ],
    "penalties": [job(index, repetition_penalty=1.3, logprobs=1) for index in range(2)],
    # Prompts of several chunks (max_num_batched_tokens).
    "chunks": [Job([1, *([7, 8, 9 + index] * 50)], job(0, tokens=12).params) for index in range(2)],
}
SCARCE: dict[str, Any] = {"num_gpu_blocks_override": 9, "max_model_len": 128}
"""Fewer KV blocks of 32 tokens than the requests fill: some are preempted."""


def start(
    models: TinyModels, draft: str | None, asynchronous: bool, strict: bool = True, **more: Any
) -> Engine:
    """An engine on V2; with SSD if there is a draft."""
    arguments: dict[str, Any] = {
        "async_scheduling": asynchronous,
        "kv_cache_memory_bytes": 1 << 28,
        "max_num_batched_tokens": 64,
        "disable_log_stats": False,
        **more,
    }
    if draft is not None:
        arguments["speculative_config"] = {
            "method": "ssd",
            "model": str(models.drafts()[draft]),
            "num_speculative_tokens": DEPTH,
            "branches": 8,
            "strict": strict,
        }
    engine = Engine(str(models.target), **arguments)
    config: Any = engine.llm.llm_engine.vllm_config
    assert config.use_v2_model_runner
    assert config.scheduler_config.async_scheduling == asynchronous
    return engine


def drafts_of(engine: Engine) -> Any:
    """What connects the engine to its draft, in-process."""
    core: Any = engine.llm.llm_engine.engine_core
    runner = core.engine_core.model_executor.driver_worker.worker.model_runner
    return runner.speculator._drafts


def answers(engine: Engine, jobs: Sequence[Job]) -> tuple[Answers, dict[str, float]]:
    """What an engine answers, and what its counters have grown by."""
    before = engine.stats()
    answered = engine.run(jobs)
    after = engine.stats()
    assert after["errors"] == after["texts_lost"] == after["misses_cannot_draft"] == 0
    return answered, {name: after[name] - before.get(name, 0.0) for name in after}


@pytest.fixture(scope="module", autouse=True)
def _async_on_cpu() -> None:
    allow_async_scheduling()


@pytest.fixture(scope="module")
def expected(tiny_pair: TinyModels) -> dict[str, Answers]:
    """What plain V2 answers."""
    engine = start(tiny_pair, None, asynchronous=False)
    try:
        return {name: engine.run(jobs) for name, jobs in WORKLOADS.items()}
    finally:
        engine.close()


@pytest.fixture(scope="module", params=[pytest.param("sync", marks=pytest.mark.slow), "async"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "async")


@pytest.fixture(scope="module")
def itself(
    tiny_pair: TinyModels, asynchronous: bool, expected: dict[str, Answers]
) -> Iterator[Engine]:
    """An engine that is its own draft; after the plain one, whose end would disturb it."""
    engine = start(tiny_pair, "itself", asynchronous)
    yield engine
    engine.close()


@pytest.mark.parametrize("workload", WORKLOADS)
def test_it_answers_as_plain_v2_does(
    itself: Engine, expected: dict[str, Answers], workload: str
) -> None:
    answered, grown = answers(itself, WORKLOADS[workload])
    assert answered == expected[workload]
    print(workload, {name: value for name, value in grown.items() if value})
    assert grown["hits"] > 0
    assert grown["tokens_accepted"] > 0
    if workload in ("plain", "chunks"):
        # Without tokens that only the target is kept from, the draft is always right.
        assert grown["tokens_accepted"] >= 0.95 * grown["tokens_drafted"]


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
    assert grown["look_ups"] > 0
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
