"""Frames lost, doubled, late, in the wrong order or full of garbage cost hits and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import LLM

from tests.robustness import harness
from tests.robustness.conftest import MAX_TOKENS, TEXTS
from tests.robustness.faulty_channel import FAULTS, Direction, Fault, FaultyChannel
from tests.robustness.harness import Decoding, stats

RATE = 0.15
"""Chance that a frame is disturbed: several are in every answer."""
RUNS = 2

HARMLESS: tuple[Fault, ...] = ("duplicate",)
"""A frame that was seen before is no reason to start again."""


@pytest.mark.parametrize("direction", ["to draft", "to target"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_channel_costs_hits_but_no_text(
    engine: LLM,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    direction: Direction,
    fault: Fault,
) -> None:
    before = stats(engine)
    disturbed = 0
    for seed in range(RUNS):
        # A new process has a new channel.
        process: Any = harness.client_of(engine).link
        if process is None:
            harness.decode_until_hits_come_back(engine, TEXTS, expected)
            process = harness.client_of(engine).link
        channel = FaultyChannel(process.channel, direction, fault, RATE, seed)
        with monkeypatch.context() as faulty:
            faulty.setattr(process, "channel", channel)
            decoding = Decoding(engine, TEXTS, MAX_TOKENS)
            assert decoding.finish() == expected
        assert decoding.longest_step < harness.STEP_SECONDS
        disturbed += channel.disturbed

    assert disturbed > 0
    after = stats(engine)
    if fault not in HARMLESS:
        assert after["resyncs"] > before["resyncs"]
    harness.decode_until_hits_come_back(engine, TEXTS, expected)
    assert stats(engine)["errors"] == 0


def test_duplicated_frames_cost_nothing(
    engine: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stats(engine)
    process: Any = harness.client_of(engine).link
    for direction in ("to draft", "to target"):
        channel = FaultyChannel(process.channel, direction, "duplicate", 1.0, seed=0)
        with monkeypatch.context() as faulty:
            faulty.setattr(process, "channel", channel)
            assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected
    after = stats(engine)
    assert after["resyncs"] == before["resyncs"]
    assert after["hits"] > before["hits"]


def test_all_faults_at_once_leave_a_working_draft(
    engine: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    process: Any = harness.client_of(engine).link
    channel: Any = process.channel
    for seed, fault in enumerate(FAULTS):
        for direction in ("to draft", "to target"):
            channel = FaultyChannel(channel, direction, fault, 0.05, seed)
    with monkeypatch.context() as faulty:
        faulty.setattr(process, "channel", channel)
        for _ in range(RUNS):
            assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected
    harness.decode_until_hits_come_back(engine, TEXTS, expected)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["to draft", "to target"])
def test_much_garbage_costs_hits_but_no_text(
    engine: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, direction: Direction
) -> None:
    for seed in range(40):
        process: Any = harness.client_of(engine).link
        if process is None:
            harness.decode_until_hits_come_back(engine, TEXTS, expected)
            process = harness.client_of(engine).link
        channel = FaultyChannel(process.channel, direction, "garbage", 0.5, seed)
        with monkeypatch.context() as faulty:
            faulty.setattr(process, "channel", channel)
            assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected
    harness.decode_until_hits_come_back(engine, TEXTS, expected)
    assert stats(engine)["errors"] == 0


def test_nothing_is_kept_of_finished_requests(engine: LLM, expected: list[list[int]]) -> None:
    published = harness.client_of(engine).published
    for _ in range(3):
        assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected
        # The engine tells of finished requests with its next step.
        Decoding(engine, TEXTS[:1], 3).finish()
    assert len(published.cache.trees) <= 1
    assert len(published.withdrawn) <= 1
