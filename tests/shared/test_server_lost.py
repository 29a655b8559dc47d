"""The server comes late, dies, stops, comes back as another: the engine decodes on, rightly."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.engine.byte_models import byte_models
from tests.robustness import harness
from tests.robustness.harness import Decoding, stats
from tests.shared.conftest import MAX_TOKENS, TEXTS
from tests.shared.hits import (
    BACK_SECONDS,
    NOTICE_SECONDS,
    decode,
    decode_for,
    decode_until,
    is_up,
    seconds_until_back,
)
from tests.shared.servers import START_SECONDS, Server, attached
from tests.tiny_models import TinyModels
from vllm_ssd.target import client


@pytest.fixture(scope="module")
def server(tiny_pair: TinyModels, folder: Path) -> Iterator[Server]:
    """A server that is not started yet."""
    (folder / "late").mkdir()
    server = Server(tiny_pair.itself, f"unix:{folder}/late/draft", folder / "late")
    yield server
    server.end_anyhow()


@pytest.fixture(scope="module")
def engine(tiny_pair: TinyModels, server: Server, expected: list[list[int]]) -> Iterator[LLM]:
    """An engine that has started before its server has."""
    with harness.running_engine(tiny_pair, attached(server.address)) as llm:
        decode(llm, expected)
        assert stats(llm)["hits"] == 0
        server.start()
        decode_for(llm, expected, 3.0)  # it is there already, and does not answer
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
        decode_until(engine, expected, lambda: not is_up(engine), 1.0 + NOTICE_SECONDS)
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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoding = Decoding(engine, TEXTS, MAX_TOKENS)
    decoding.steps(5)
    server.kill()
    assert decoding.finish() == expected
    assert decoding.longest_step < harness.STEP_SECONDS

    # Of another vocabulary: it refuses the engine, which says why.
    monkeypatch.setattr(client.logger, "handlers", [caplog.handler])
    server.start(byte_models(tiny_pair, tmp_path).near)
    server.wait_for("listens on", START_SECONDS)
    hits = stats(engine)["hits"]
    refused = "a target is refused"
    decode_until(engine, expected, lambda: refused in server.log, BACK_SECONDS + NOTICE_SECONDS)
    decode(engine, expected)
    assert stats(engine)["hits"] == hits
    assert "differs from the target's; choose a draft with the target's tokenizer" in caplog.text
    assert server.end() == 0
    assert not server.processes()

    # Of the same vocabulary, but another model: it is used.
    server.start_and_wait(tiny_pair.near)
    seconds_until_back(engine, expected)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
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
    decode(engine, expected)
    assert "Traceback" not in server.log
