"""The draft server comes late, dies, stops, comes back as another: the engine decodes on, rightly."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.engine.byte_models import byte_models
from tests.robustness import harness
from tests.robustness.harness import Decoding, stats
from tests.shared.conftest import MAX_TOKENS, TEXTS
from tests.shared.servers import START_SECONDS, Server, attached
from tests.tiny_models import TinyModels
from vllm_ssd.target import client

BACK_SECONDS = 2.0
"""After this time a draft that can be reached again is used."""


@pytest.fixture(scope="module")
def server(tiny_pair: TinyModels, folder: Path) -> Iterator[Server]:
    """A server that is not started yet."""
    server = Server(tiny_pair.itself, f"unix:{folder}/draft", folder)
    yield server
    server.end_anyhow()


@pytest.fixture(scope="module")
def engine(tiny_pair: TinyModels, server: Server, expected: list[list[int]]) -> Iterator[LLM]:
    """An engine that has started before its server has."""
    with harness.running_engine(tiny_pair, attached(server.address)) as llm:
        assert Decoding(llm, TEXTS, MAX_TOKENS).finish() == expected
        assert stats(llm)["hits"] == 0
        server.start()
        decode_while_down(llm, expected)
        server.wait_for("listens on", START_SECONDS)
        seconds_until_back(llm, expected)
        yield llm


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft is presumed hung after one second."""
    monkeypatch.setattr(client, "SILENCE_SECONDS", 1.0)


def test_a_server_that_comes_after_the_engine_is_used(
    engine: LLM, server: Server, expected: list[list[int]]
) -> None:
    before = stats(engine)
    assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected
    after = stats(engine)
    assert after["hits"] > before["hits"]
    assert after["misses_draft_down"] == before["misses_draft_down"]
    assert server.targets == 1


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_stopped_is_given_up_and_used_again(
    engine: LLM, server: Server, expected: list[list[int]]
) -> None:
    before = stats(engine)
    decoding = Decoding(engine, TEXTS, MAX_TOKENS)
    decoding.steps(5)
    server.signal(signal.SIGSTOP)
    try:
        assert decoding.finish() == expected
        assert decoding.longest_step < harness.STEP_SECONDS
        stop_until_given_up(engine, expected)
    finally:
        server.signal(signal.SIGCONT)
    assert seconds_until_back(engine, expected) < BACK_SECONDS
    assert stats(engine)["misses_draft_down"] > before["misses_draft_down"]
    server.wait_for_targets(1, BACK_SECONDS)


def test_a_server_killed_and_started_with_other_models(
    engine: LLM,
    server: Server,
    expected: list[list[int]],
    tiny_pair: TinyModels,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    decoding = Decoding(engine, TEXTS, MAX_TOKENS)
    decoding.steps(5)
    server.kill()
    assert decoding.finish() == expected
    assert decoding.longest_step < harness.STEP_SECONDS

    # Of another vocabulary: it refuses the engine, which says why.
    logging.getLogger("vllm").addHandler(caplog.handler)
    server.start(byte_models(tiny_pair, tmp_path).near)
    decode_while_down(engine, expected)
    server.wait_for("listens on", START_SECONDS)
    server.wait_for("a target is refused", BACK_SECONDS + stepped(engine, expected))
    hits = stats(engine)["hits"]
    assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected
    assert stats(engine)["hits"] == hits
    assert "differs from the target's; choose a draft with the target's tokenizer" in caplog.text
    assert server.end() == 0
    assert not server.processes()

    # Of the same vocabulary, but another model: it is used.
    server.start_and_wait(tiny_pair.near)
    assert seconds_until_back(engine, expected) < BACK_SECONDS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_asked_to_end_leaves_nothing(
    engine: LLM, server: Server, expected: list[list[int]], number: signal.Signals
) -> None:
    if server.process.poll() is not None:
        server.start_and_wait()
        seconds_until_back(engine, expected)
    decoding = Decoding(engine, TEXTS, MAX_TOKENS)
    decoding.steps(5)
    path = Path(server.address.removeprefix("unix:"))
    assert path.exists()
    server.signal(number)
    assert server.process.wait(10) == 0
    assert not server.processes()
    assert not path.exists()
    assert decoding.finish() == expected
    assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected
    assert "Traceback" not in server.log


def stepped(engine: LLM, expected: list[list[int]]) -> float:
    """Decode for a while, so that the client has looked for the server: 0 seconds more to wait."""
    until = time.monotonic() + BACK_SECONDS
    while time.monotonic() < until:
        assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected
    return 0.0


def decode_while_down(engine: LLM, expected: list[list[int]]) -> None:
    """The texts are right, and no step is long, while nothing answers."""
    for _ in range(3):
        decoding = Decoding(engine, TEXTS, MAX_TOKENS)
        assert decoding.finish() == expected
        assert decoding.longest_step < harness.STEP_SECONDS


def stop_until_given_up(engine: LLM, expected: list[list[int]]) -> None:
    """Decode until the engine has given the server up."""
    deadline = time.monotonic() + 30.0
    while harness.client_of(engine).up:
        assert time.monotonic() < deadline
        decode_while_down(engine, expected)


def seconds_until_back(engine: LLM, expected: list[list[int]]) -> float:
    """Decode until look-ups hit again; how long that took."""
    began, before = time.monotonic(), stats(engine)["hits"]
    while stats(engine)["hits"] == before:
        assert time.monotonic() - began < harness.RECOVERY_SECONDS, "hits did not come back"
        decoding = Decoding(engine, TEXTS, MAX_TOKENS)
        assert decoding.finish() == expected
        assert decoding.longest_step < harness.STEP_SECONDS
    return time.monotonic() - began
