"""Decoding while a draft server comes and goes."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm import LLM

from tests.robustness import harness
from tests.robustness.harness import Decoding, stats
from tests.shared.conftest import MAX_TOKENS, TEXTS

BACK_SECONDS = 2.0
"""After this time a draft that can be reached again is used."""
NOTICE_SECONDS = 3.0
"""After this time beyond the silence that is allowed, it has been noticed on a busy machine."""


def decode(engine: LLM, expected: list[list[int]]) -> None:
    """Decode once: the texts are right, and no step is long."""
    decoding = Decoding(engine, TEXTS, MAX_TOKENS)
    assert decoding.finish() == expected
    assert decoding.longest_step < harness.STEP_SECONDS


def decode_for(engine: LLM, expected: list[list[int]], seconds: float) -> None:
    """Decode again and again."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        decode(engine, expected)


def decode_until(
    engine: LLM, expected: list[list[int]], condition: Callable[[], bool], seconds: float
) -> None:
    """Decode again and again until the condition holds.

    Raises:
        AssertionError: it does not within this time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        decode(engine, expected)


def is_up(engine: LLM) -> bool:
    """Whether the engine has a draft."""
    return harness.client_of(engine).up


def seconds_until_back(engine: LLM, expected: list[list[int]]) -> float:
    """Decode until look-ups hit again; how long that took."""
    began, before = time.monotonic(), stats(engine)["hits"]
    while True:
        decoding = Decoding(engine, TEXTS, MAX_TOKENS)
        while decoding.running and stats(engine)["hits"] == before:
            decoding.step()
        seconds = time.monotonic() - began
        found = decoding.running
        assert decoding.finish() == expected
        assert decoding.longest_step < harness.STEP_SECONDS
        if found:
            return seconds
        assert seconds < harness.RECOVERY_SECONDS, "hits did not come back"


def decode_until_most_hit(engine: LLM, expected: list[list[int]]) -> None:
    """Decode until most look-ups of an answer hit; a draft that has just started is slow."""
    began = time.monotonic()
    while True:
        before = stats(engine)
        decode(engine, expected)
        after = stats(engine)
        if after["hits"] - before["hits"] > 0.5 * (after["look_ups"] - before["look_ups"]):
            return
        assert time.monotonic() - began < harness.RECOVERY_SECONDS, after
