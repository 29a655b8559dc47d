"""vLLM's own OpenAI server with SSD, started by ``vllm-ssd serve``, used by a real client."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.robustness import harness
from tests.robustness.conftest import TEXTS
from tests.robustness.scripts import START_SECONDS
from tests.robustness.serving import Server, stats_of, tiny_server
from tests.tiny_models import TinyModels
from vllm_ssd import metrics, stats_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(
    tiny_pair: TinyModels, plain_answers: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The one server of this file; the plain engine has ended before it starts."""
    running = tiny_server(tiny_pair, tmp_path_factory.mktemp("server"))
    try:
        harness.wait_for(running.is_healthy, START_SECONDS, "a healthy server")
        yield running
    finally:
        running.end()


def test_concurrent_answers_streamed_or_not_are_plain_vllms(
    server: Server, expected: list[list[int]]
) -> None:
    asked = [(i, stream) for i in range(len(TEXTS)) for stream in (False, True)]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda a: server.complete(TEXTS[a[0]], a[1]), asked))
    for (i, _), answer in zip(asked, answers, strict=True):
        assert answer == expected[i]


def test_metrics_count_drafts(server: Server, expected: list[list[int]]) -> None:
    assert server.complete(TEXTS[0], stream=False) == expected[0]
    assert server.metric("vllm:spec_decode_num_drafts_total") > 0
    accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
    assert 0 < accepted <= server.metric("vllm:spec_decode_num_draft_tokens_total")


def assert_metrics_are_right(server: Server) -> None:
    """Compare ``/metrics`` with our counters, once they are up to date."""
    time.sleep(3 * metrics.SECONDS)
    stats, found = stats_of(server), server.metrics()
    ours = [one for one in found if one[0].startswith("vllm:ssd_")]
    assert {one[1]["model_name"] for one in ours} == {"tiny"}
    assert {one[1]["engine"] for one in ours} == {"0"}
    value: dict[str, float] = defaultdict(float)
    for name, _, number in ours:
        value[name] += number
    for name, (counter, _) in metrics.COUNTERS.items():
        assert value[f"vllm:{name}_total"] == stats[counter] or counter.startswith("draft_"), name
    assert value["vllm:ssd_hits_total"] > 10
    drafted, accepted = (
        value["vllm:ssd_draft_tokens_total"],
        value["vllm:ssd_accepted_tokens_total"],
    )
    assert 0 < accepted <= drafted <= stats["tokens_drafted"]
    assert value["vllm:ssd_draft_up"] == 1.0
    for kind in ("verify_seconds", "draft_step_seconds"):
        assert value[f"vllm:{metrics.TIMES[kind][0]}_count"] > 10, kind
    assert value["vllm:ssd_depth_at_hit_count"] == value["vllm:ssd_hits_total"]
    depth = value["vllm:ssd_depth_at_hit_sum"] / value["vllm:ssd_depth_at_hit_count"]
    assert depth == pytest.approx(stats["mean_depth_at_hit"])
    assert value["vllm:ssd_verification_time_seconds_sum"] <= 1.01 * stats["verify_seconds"]


def test_metrics_are_those_of_the_counters(server: Server) -> None:
    for text in TEXTS[:3]:
        server.complete(text, stream=False)
    assert_metrics_are_right(server)


def test_the_log_has_a_line_of_the_speculation(server: Server) -> None:
    def said() -> bool:
        server.complete(TEXTS[0], stream=False)
        return server.has_said("SSD metrics: Hit rate:")

    harness.wait_for(said, 30.0, "a line of the speculation in the log")


def test_counters_are_read_over_http(server: Server) -> None:
    assert stats_of(server)["hits"] > 0


def test_client_that_goes_away_disturbs_no_other_request(
    server: Server, expected: list[list[int]]
) -> None:
    stream: Any = server.client.completions.create(
        model="tiny", prompt=TEXTS[0], max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert server.complete(TEXTS[1], stream=True) == expected[1]


def test_server_answers_on_while_its_draft_is_replaced(
    server: Server, expected: list[list[int]]
) -> None:
    (killed,) = server.drafts()

    def answers_rightly() -> None:
        for text, answer in zip(TEXTS, expected, strict=True):
            assert server.complete(text, stream=True) == answer

    with ThreadPoolExecutor(1) as thread:
        answering = thread.submit(answers_rightly)
        os.kill(killed, signal.SIGKILL)
        answering.result()

    def drafts_again() -> bool:
        before = server.metric("vllm:spec_decode_num_drafts_total")
        answers_rightly()
        return server.metric("vllm:spec_decode_num_drafts_total") > before

    harness.wait_for(drafts_again, harness.RECOVERY_SECONDS, "drafts of a new process")
    assert killed not in server.drafts()


def test_server_stopped_by_a_signal_leaves_nothing(server: Server) -> None:
    assert len(server.drafts()) == 1
    assert stats_files()
    server.signal(signal.SIGTERM)
    assert server.wait(START_SECONDS) == 0
    server.assert_nothing_left()
    assert not stats_files()


def stats_files() -> list[Path]:
    """The files in which workers leave their counters for servers."""
    return sorted(stats_file._IN_MEMORY.glob(f"{stats_file.prefix()}*"))


def test_several_api_servers_tell_the_same_metrics(tiny_pair: TinyModels, tmp_path: Path) -> None:
    before = set(stats_files())
    running = tiny_server(tiny_pair, tmp_path, api_server_count=2)
    try:
        harness.wait_for(running.is_healthy, START_SECONDS, "a healthy server")
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda text: running.complete(text, stream=False), TEXTS * 2))
        for _ in range(4):  # whichever of the two answers
            assert_metrics_are_right(running)
    finally:
        running.end()

    def gone() -> bool:
        stats_file.name_engine(inherits=False)
        stats_file.Reader().close()
        return set(stats_files()) <= before

    # They were killed, as vLLM itself ends several: the next server's process removes their file.
    harness.wait_for(gone, harness.GONE_SECONDS, "no file left")


def test_server_interrupted_while_it_starts_leaves_nothing(
    tiny_pair: TinyModels, tmp_path: Path
) -> None:
    starting = tiny_server(tiny_pair, tmp_path)
    try:
        harness.wait_for(lambda: bool(starting.drafts()), START_SECONDS, "a draft that starts")
        # vLLM 0.32 may forget an interrupt that comes while its engine starts, with or without SSD.
        harness.wait_for(lambda: _ends(starting, signal.SIGINT), START_SECONDS, "an end")
        starting.assert_nothing_left()
    finally:
        starting.end()


def _ends(server: Server, number: int) -> bool:
    """Whether it has ended; if not, it gets the signal, once more after a while."""
    if server.running:
        server.signal(number)
        time.sleep(5.0)
    return not server.running
