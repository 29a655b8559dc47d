"""Speculation that goes off and on, and proposals cut short, change no text."""

from __future__ import annotations

from collections.abc import Callable

from tests.decisions import InTurns
from tests.engine.conftest import SPECS
from tests.engine.harness import Job, Pair, Spec, assert_identical, difference, greedy, prompt


def test_text_is_plain_vllms_while_speculation_goes_off_and_on(
    start_pair: Callable[[Spec], Pair], stop_pair: Callable[[], None]
) -> None:
    pair = start_pair(SPECS["near"])
    jobs = [Job(prompt(10 + 9 * i, i), greedy(120), arrives=4 * i) for i in range(16)]
    expected = pair.expected(jobs)
    before, rounds = pair.ssd.stats(), pair.ssd.drafter.rounds
    usual, rounds.decisions = (
        rounds.decisions,
        InTurns(rounds.requests, rounds.pace, rounds.stats),
    )
    try:
        found = pair.ssd.run(jobs)
    finally:
        rounds.decisions = usual
    grown = difference(pair.ssd.stats(), before)
    stop_pair()  # it is the last test of its folder
    assert_identical(jobs, expected, found)
    assert grown["rounds_off"] > 50
    assert grown["tokens_accepted"] > 20
    assert grown["tokens_chosen"] < grown["tokens_found"]
    assert grown["errors"] == grown["resyncs"] == grown["misses_draft_down"] == 0
