"""A draft that is stopped, or whose frames are lost or full of garbage, costs hits and no text."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.engine.harness import Engine, difference
from tests.robustness import harness
from tests.robustness.faulty_channel import FAULTS, Direction, Fault, FaultyChannel
from tests.robustness.harness import Decoding, stats
from tests.tiny_models import TinyModels
from tests.v2.engines.harness import TEXTS, client_of, drafts_of, running
from vllm_ssd.target import client

pytestmark = pytest.mark.slow

PROMPTS = [text.prompt for text in TEXTS]
MAX_TOKENS = TEXTS[0].tokens
RUNS = 3
RATE = 0.15
"""Chance that a frame is disturbed."""


@pytest.fixture(scope="module")
def engine(
    tiny_pair: TinyModels, asynchronous: bool, expected_texts: list[list[int]]
) -> Iterator[Engine]:
    """An engine that is its own draft."""
    with running(tiny_pair, "itself", asynchronous, max_model_len=1024) as engine:
        yield engine


@pytest.fixture
def expected(engine: Engine, expected_texts: list[list[int]]) -> list[list[int]]:
    """What is right; the draft is up when a test begins."""
    expected = expected_texts[:-1]
    harness.decode_until_hits_come_back(engine.llm, PROMPTS, expected)
    return expected


def decode_with(engine: Engine, expected: list[list[int]], channel: FaultyChannel) -> None:
    """Decode while this channel is in the place of the draft's."""
    link, thread = client_of(engine).link, drafts_of(engine).thread
    thread.ask(lambda: setattr(link, "channel", channel))
    decoding = Decoding(engine.llm, PROMPTS, MAX_TOKENS)
    assert decoding.finish() == expected
    assert decoding.longest_step < harness.STEP_SECONDS
    thread.ask(lambda: setattr(link, "channel", channel._channel))


@pytest.mark.parametrize("direction", ["to draft", "to target"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_channel_cost_hits_but_no_text(
    engine: Engine, expected: list[list[int]], direction: Direction, fault: Fault
) -> None:
    before, disturbed = stats(engine.llm), 0
    for seed in range(RUNS):
        harness.decode_until_hits_come_back(engine.llm, PROMPTS, expected)
        channel = client_of(engine).link.channel
        faulty = FaultyChannel(channel, direction, fault, RATE, seed)
        decode_with(engine, expected, faulty)
        disturbed += faulty.disturbed
    assert disturbed > 0
    harness.decode_until_hits_come_back(engine.llm, PROMPTS, expected)
    grown = difference(stats(engine.llm), before)
    # A frame that was seen before is no reason to start again.
    assert (grown["resyncs"] + grown["restarts"] > 0) == (fault != "duplicate")
    assert grown["errors"] == grown["texts_lost"] == 0


@pytest.mark.parametrize("direction", ["to draft", "to target"])
def test_much_garbage_costs_hits_but_no_text(
    engine: Engine, expected: list[list[int]], direction: Direction
) -> None:
    before = stats(engine.llm)
    for seed in range(20):
        if client_of(engine).link is None:
            harness.decode_until_hits_come_back(engine.llm, PROMPTS, expected)
        channel = client_of(engine).link.channel
        decode_with(engine, expected, FaultyChannel(channel, direction, "garbage", 0.5, seed))
    harness.decode_until_hits_come_back(engine.llm, PROMPTS, expected)
    grown = difference(stats(engine.llm), before)
    assert grown["resyncs"] > 0
    assert grown["errors"] == grown["texts_lost"] == 0


def test_a_draft_that_is_stopped_under_load_is_replaced(
    engine: Engine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENCE_SECONDS", 1.0)
    before = stats(engine.llm)
    stopped = client_of(engine).link.pid
    decoding = Decoding(engine.llm, PROMPTS, MAX_TOKENS)
    decoding.steps(4)
    os.kill(stopped, signal.SIGSTOP)
    decoding.steps(3)
    grown = difference(stats(engine.llm), before)
    assert grown["misses_not_ready"] + grown["misses_no_branch"] > 0
    others = Decoding(engine.llm, PROMPTS, MAX_TOKENS)
    assert decoding.finish() == others.finish() == expected
    assert max(decoding.longest_step, others.longest_step) < harness.STEP_SECONDS
    harness.decode_until_hits_come_back(engine.llm, PROMPTS, expected)
    grown = difference(stats(engine.llm), before)
    assert grown["restarts"] == 1
    assert grown["errors"] == grown["texts_lost"] == 0
    assert not harness.is_alive(stopped)


def test_nothing_is_kept_of_finished_requests(engine: Engine, expected: list[list[int]]) -> None:
    for _ in range(3):
        assert Decoding(engine.llm, PROMPTS, MAX_TOKENS).finish() == expected
        # The engine tells of finished requests with its next step.
        Decoding(engine.llm, PROMPTS[:1], 3).finish()
    thread, published = drafts_of(engine).thread, client_of(engine).published
    assert thread.ask(lambda: len(published.cache.trees)) <= 1
    assert thread.ask(lambda: len(published._slots)) <= 1
