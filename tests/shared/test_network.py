"""A network between an engine and its draft server that is slow, or is cut for a while."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from vllm import LLM

from tests.robustness import harness
from tests.robustness.harness import Decoding, stats
from tests.shared.conftest import MAX_TOKENS, TEXTS
from tests.shared.hits import (
    BACK_SECONDS,
    NOTICE_SECONDS,
    decode,
    decode_for,
    decode_until,
    decode_until_most_hit,
    is_up,
    seconds_until_back,
)
from tests.shared.relay import Relay
from tests.shared.servers import Server, attached
from tests.tiny_models import TinyModels
from vllm_ssd.target import client
from vllm_ssd.wire.address import parse_address
from vllm_ssd.wire.keys import read_key
from vllm_ssd.wire.network import connect


@pytest.fixture(scope="module")
def relay(server: Server) -> Iterator[Relay]:
    """The network to the server."""
    relay = Relay(int(server.address.rpartition(":")[2]))
    yield relay
    relay.close()


@pytest.fixture(scope="module")
def engine(
    tiny_pair: TinyModels, relay: Relay, server: Server, expected: list[list[int]]
) -> Iterator[LLM]:
    """An engine at the other end of it."""
    options = attached(relay.address, server.key_file)
    with harness.running_engine(tiny_pair, options) as llm:
        seconds_until_back(llm, expected)
        yield llm


@pytest.mark.parametrize(
    "delay_ms", [*(pytest.param(ms, marks=pytest.mark.slow) for ms in (0.0, 0.2, 5.0)), 1.0]
)
def test_a_delay_costs_time_and_no_text(
    engine: LLM, relay: Relay, server: Server, expected: list[list[int]], delay_ms: float
) -> None:
    relay.delay = 1e-3 * delay_ms
    try:
        began = time.monotonic()
        assert server.key_file is not None
        connect(parse_address(relay.address), read_key(server.key_file), 5.0).close()
        assert time.monotonic() - began > 2 * relay.delay  # there and back at least
        before = stats(engine)
        # The engine waits for its draft: a delay costs no hits, if the machine keeps up.
        decode_until_most_hit(engine, expected)
        after = stats(engine)
    finally:
        relay.delay = 0.0
    for name in ("misses_draft_down", "resyncs", "errors", "restarts"):
        assert after[name] == before[name], name


@pytest.mark.parametrize(
    ("seconds", "silence"), [(2.0, 1.0), pytest.param(10.0, 5.0, marks=pytest.mark.slow)]
)
def test_a_cut_is_noticed_and_what_comes_after_it_is_used(
    engine: LLM,
    relay: Relay,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    silence: float,
) -> None:
    assert client.SILENCE_SECONDS == 5.0
    monkeypatch.setattr(client, "SILENCE_SECONDS", silence)
    before = stats(engine)
    decoding = Decoding(engine, TEXTS, MAX_TOKENS)
    decoding.steps(5)
    began = time.monotonic()
    relay.cut()
    try:
        assert decoding.finish() == expected
        assert decoding.longest_step < harness.STEP_SECONDS
        decode_until(engine, expected, lambda: not is_up(engine), silence + NOTICE_SECONDS)
        decode_for(engine, expected, seconds - (time.monotonic() - began))
    finally:
        relay.heal()
    assert seconds_until_back(engine, expected) < BACK_SECONDS
    after = stats(engine)
    assert after["misses_draft_down"] > before["misses_draft_down"]
    # Its counters are those since it has joined: no step is counted twice.
    decode(engine, expected)
    assert stats(engine)["draft_steps"] < 2 * before["draft_steps"] + after["look_ups"]


def test_a_short_cut_costs_no_connection(
    engine: LLM, relay: Relay, expected: list[list[int]]
) -> None:
    restarts = stats(engine)["restarts"]
    relay.cut()
    try:
        decode(engine, expected)
    finally:
        relay.heal()
    seconds_until_back(engine, expected)
    assert stats(engine)["restarts"] == restarts


def test_connections_that_break_are_made_again(
    engine: LLM, relay: Relay, server: Server, expected: list[list[int]]
) -> None:
    sockets = open_sockets(os.getpid()), open_sockets(server.process.pid)
    for _ in range(3):
        decoding = Decoding(engine, TEXTS, MAX_TOKENS)
        decoding.steps(3)
        relay.reset()
        assert decoding.finish() == expected
        assert seconds_until_back(engine, expected) < BACK_SECONDS
    # And those that broke are closed.
    harness.wait_for(
        lambda: (
            sockets == (open_sockets(os.getpid()), open_sockets(server.process.pid))
            and server.targets == 1
        ),
        BACK_SECONDS,
        "as many sockets as before",
    )


def open_sockets(pid: int) -> int:
    """How many a process has."""
    return sum("socket" in name for name in harness.open_files(pid))
