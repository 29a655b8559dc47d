"""Real engines at one draft server: each writes what plain vLLM writes, and gets its share."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.robustness import harness
from tests.shared.conftest import MAX_TOKENS, TEXTS
from tests.shared.engines import EngineProcess, running_engines
from tests.shared.script import Order, Report
from tests.shared.servers import Server, attached, free_port, new_key
from tests.tiny_models import TinyModels

FREED_SECONDS = 2.0
"""After this time the server has freed what a target that was killed held."""
ENDLESS = 10_000


@pytest.fixture(scope="module")
def pair(server: Server, folder: Path) -> Iterator[list[EngineProcess]]:
    """Two engines at it."""
    with running_engines(2, attached(server.address), folder) as engines:
        yield engines


def test_two_engines_at_once_write_what_plain_vllm_writes(
    pair: list[EngineProcess], expected: list[list[int]]
) -> None:
    check_all(pair, expected, rounds=4)


def test_requests_aborted_in_mid_flight_disturb_neither(
    pair: list[EngineProcess], expected: list[list[int]]
) -> None:
    for engine in pair:
        engine.order(Order(TEXTS, MAX_TOKENS, times=3, aborted=[2, 0]))
    for engine in pair:
        for _ in range(3):
            report = engine.next_report()
            assert report.answers[1] == expected[1]
            for index in (0, 2):
                answer = report.answers[index]
                assert answer == expected[index][: len(answer)] != expected[index]
            assert report.stats["resyncs"] == report.stats["errors"] == 0
    check_all(pair, expected, rounds=1)


def test_an_engine_that_is_stopped_costs_the_other_nothing(
    pair: list[EngineProcess], expected: list[list[int]]
) -> None:
    stopped, other = pair
    stopped.order(Order(TEXTS, MAX_TOKENS, times=ENDLESS))
    check(stopped.next_report(), expected)
    stopped.signal(signal.SIGSTOP)
    until = time.monotonic() + 3.0  # the server finds it quiet after two
    while time.monotonic() < until:
        other.order(Order(TEXTS, MAX_TOKENS))
        check(other.next_report(), expected)
    stopped.signal(signal.SIGCONT)
    stopped.forget_reports()
    check(stopped.next_report(), expected)
    # Its own clock says that the draft was silent all the time: it is not.
    assert stopped.next_report().stats["restarts"] == 0


def test_what_a_killed_engine_held_is_freed_at_once(
    pair: list[EngineProcess], server: Server, expected: list[list[int]]
) -> None:
    killed, other = pair
    killed.order(Order(TEXTS, MAX_TOKENS, times=ENDLESS))
    killed.forget_reports()
    check(killed.next_report(), expected)
    assert server.targets == 2
    other.order(Order(TEXTS, MAX_TOKENS, times=3))
    killed.signal(signal.SIGKILL)
    assert server.wait_for_targets(1, FREED_SECONDS) < FREED_SECONDS
    for _ in range(3):
        check(other.next_report(), expected)


@pytest.mark.slow
def test_four_engines_over_tcp_get_their_shares(
    tiny_pair: TinyModels, tmp_path: Path, expected: list[list[int]]
) -> None:
    key = new_key(tmp_path)
    server = Server(tiny_pair.itself, f"tcp://127.0.0.1:{free_port()}", tmp_path, key)
    server.start_and_wait()
    try:
        with running_engines(4, attached(server.address, key), tmp_path) as engines:
            check_all(engines, expected, rounds=6)
            assert server.targets == 4
            for victim in engines[:2]:
                victim.signal(signal.SIGKILL)
            server.wait_for_targets(2, FREED_SECONDS)
            check_all(engines[2:], expected, rounds=3)
            with running_engines(1, attached(server.address, key), tmp_path) as next_ones:
                check_all([*engines[2:], *next_ones], expected, rounds=3)
        server.wait_for_targets(0, FREED_SECONDS)
    finally:
        server.end_anyhow()


def check_all(engines: list[EngineProcess], expected: list[list[int]], rounds: int) -> None:
    """Let the engines decode at the same time: all are right, and hit about as often."""
    for engine in engines:
        engine.order(Order(TEXTS, MAX_TOKENS, times=rounds))
    rates = []
    for engine in engines:
        reports = [engine.next_report() for _ in range(rounds)]
        for report in reports:
            check(report, expected)
        rates.append(sum(report.hit_rate for report in reports) / rounds)
    assert min(rates) > 0.5 * max(rates), rates


def check(report: Report, expected: list[list[int]]) -> None:
    """The texts are right, and the draft has helped."""
    assert report.answers == expected
    assert report.longest_step < harness.STEP_SECONDS
    assert report.stats["hits"] > 0
    assert report.stats["errors"] == 0
