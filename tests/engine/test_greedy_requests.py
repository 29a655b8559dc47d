"""Greedy output is token-identical to vLLM's without speculation, whatever a request asks for."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.engine.harness import (
    Answer,
    Job,
    Pair,
    assert_identical,
    difference,
    greedy,
    hit_rate_after_first,
    prompt,
    staggered,
)
from tests.tiny_models import EOS
from vllm_ssd.target import notices, rounds

MIXED_LENGTHS = (5, 90, 17, 33, 150, 8, 1, 64, 40, 200, 12, 31, 75, 2, 110, 24)


def test_one_request(pair: Pair) -> None:
    stats = pair.check_identical([Job(prompt(20), greedy(120))])
    if pair.spec.draft == "itself":
        assert hit_rate_after_first(stats) == 1.0
    else:
        assert stats["tokens_accepted"] < stats["tokens_drafted"]


def test_requests_of_mixed_lengths_arriving_over_time(pair: Pair) -> None:
    stats = pair.check_identical(staggered(MIXED_LENGTHS, every=2, params=greedy(40)))
    assert stats["first_look_ups"] == len(MIXED_LENGTHS)
    if pair.spec.draft != "random":
        assert stats["hits"] > len(MIXED_LENGTHS)


def test_more_requests_than_the_batch_holds(pair: Pair) -> None:
    lengths = [10 + 3 * i for i in range(24)]
    jobs = [Job(prompt(n, n), greedy(6 + n % 17)) for n in lengths]
    pair.check_identical(jobs)


def test_aborts_in_mid_flight(pair: Pair) -> None:
    jobs = [
        Job(prompt(n, i), greedy(40), arrives=i, abort_after=1 + 5 * i if i % 2 else None)
        for i, n in enumerate(MIXED_LENGTHS[:10])
    ]
    pair.check_identical(jobs)
    # The next requests find nothing of the aborted ones.
    pair.check_identical(jobs[::-1])


def test_the_same_prompt_again_is_answered_from_the_prefix_cache(pair: Pair) -> None:
    before = pair.ssd.metric("prefix_cache_hits")
    # 97 tokens: all but one are cached the second time, and vLLM pads its drafts with -1.
    jobs = [Job(prompt(97, 3), greedy(30)), Job(prompt(97, 3), greedy(30), arrives=100)]
    pair.check_identical(jobs)
    pair.check_identical(jobs)
    assert pair.ssd.metric("prefix_cache_hits") >= before + 3 * 96


def test_prompts_up_to_the_model_length_beside_short_ones(pair: Pair) -> None:
    longest = 255
    jobs = [
        Job(prompt(longest, 1), greedy(None)),
        Job(prompt(9, 2), greedy(60)),
        Job(prompt(longest - 3, 3), greedy(None), arrives=4),
        Job(prompt(longest - 40, 4), greedy(None), arrives=6),
        Job(prompt(30, 5), greedy(None), arrives=6),
    ]
    pair.check_identical(jobs)


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_outputs_shorter_than_a_draft(pair: Pair, max_tokens: int) -> None:
    # One long request proves that there is speculation at all.
    jobs = staggered(MIXED_LENGTHS[:8], every=1, params=greedy(max_tokens))
    pair.check_identical([Job(prompt(20), greedy(60)), *jobs])


def _answer_tokens(pair: Pair) -> tuple[int, ...]:
    """What follows ``prompt(20)``: end conditions are taken from it."""
    return pair.expected([Job(prompt(20), greedy(60))])[0][0].tokens


def _first_new(tokens: tuple[int, ...], at_least: int) -> int:
    """The first index from ``at_least`` on whose token has not been seen before."""
    return next(i for i in range(at_least, len(tokens)) if tokens[i] not in tokens[:i])


def test_requests_end_at_stop_tokens(pair: Pair) -> None:
    tokens = _answer_tokens(pair)
    ends = [_first_new(tokens, at_least) for at_least in (1, 10, 17, 30)]
    jobs = [Job(prompt(20), greedy(60, stop_token_ids=[tokens[at]])) for at in ends]
    jobs.append(Job(prompt(20), greedy(60, stop_token_ids=list(tokens[12:24]), min_tokens=9)))
    jobs.append(Job(prompt(20), greedy(60)))
    pair.check_identical(jobs)
    answers = [answers[0] for answers in pair.ssd.run(jobs)]
    for answer, at in zip(answers, ends, strict=False):
        assert (answer.finish_reason, answer.stop_reason) == ("stop", tokens[at])
        assert len(answer.tokens) == at + 1


def test_requests_end_at_stop_strings(pair: Pair) -> None:
    text = pair.expected([Job(prompt(20), greedy(60))])[0][0].text
    letters = [i for i in range(len(text) - 2) if text[i : i + 3].isascii()]
    stops = [text[i : i + 3] for i in (letters[0], letters[len(letters) // 2], letters[-1])]
    jobs = [Job(prompt(20), greedy(60, stop=[stop])) for stop in stops]
    jobs.append(Job(prompt(20), greedy(60, stop=stops, include_stop_str_in_output=True)))
    pair.check_identical([Job(prompt(20), greedy(60)), *jobs])
    for answers in pair.ssd.run(jobs):
        assert answers[0].finish_reason == "stop"
        assert answers[0].stop_reason in stops


def test_no_end_token_is_proposed_however_many_there_are(pair: Pair) -> None:
    ends = set(range(100, 500, 10))
    params = greedy(60, stop_token_ids=sorted(ends))
    with pair.watched_proposals() as proposed:
        pair.check_identical([Job(prompt(8 + n, n), params) for n in range(16)])
    assert len(proposed) > 20
    assert proposed.isdisjoint(ends)


def test_long_texts_are_announced_in_turn(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "ANNOUNCED_TOKENS", 1)
    stats = pair.check_identical([Job(prompt(n, n + 50), greedy(40)) for n in MIXED_LENGTHS])
    # One a step; the others decode plainly until it is their turn.
    assert stats["misses_resync"] >= sum(range(len(MIXED_LENGTHS) - 1))
    if pair.spec.draft != "random":
        assert stats["hits"] > len(MIXED_LENGTHS)


@pytest.mark.parametrize("hook", ["_notices.scheduled", "_answer", "_notices.verified"])
def test_errors_of_the_plugin_cost_hits_and_one_line_of_the_log(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hook: str
) -> None:
    ours = pair.ssd.drafter.rounds
    owner, name = (ours._notices, hook.split(".")[1]) if "." in hook else (ours, hook)
    whole, calls = getattr(owner, name), itertools.count()

    def faulty(*arguments: Any) -> Any:
        if next(calls) % 3 == 2:
            raise ZeroDivisionError
        return whole(*arguments)

    monkeypatch.setattr(owner, name, faulty)
    monkeypatch.setattr(ours, "config", ours.config.model_copy(update={"strict": False}))
    monkeypatch.setattr(ours, "_complained", False)
    jobs = [Job(prompt(n, n), greedy(40), arrives=n % 5) for n in MIXED_LENGTHS]
    expected, before = pair.expected(jobs), pair.ssd.stats()
    assert_identical(jobs, expected, pair.ssd.run(jobs))
    stats = difference(pair.ssd.stats(), before)
    assert stats["errors"] > 3
    said = [one.getMessage() for one in caplog.records if one.name == rounds.logger.name]
    assert said == ["ssd: error in the plugin; decoding goes on plainly"]
    monkeypatch.undo()
    # The next requests are drafted for as before.
    pair.check_identical(jobs)


def test_strict_raises_errors_of_the_plugin(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = pair.ssd.drafter
    monkeypatch.setattr(drafter.rounds, "_announce_again", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        drafter.propose([[1]], np.array([1], np.int32), np.ones((1, 1), np.int32))
    monkeypatch.undo()
    pair.check_identical([Job(prompt(20), greedy(40))])


def test_requests_end_at_eos(pair: Pair) -> None:
    # Greedy text ends by itself once in a while; those are the requests wanted here.
    jobs = [Job(prompt(8 + i % 9, i), greedy(60, ignore_eos=False)) for i in range(80)]
    answers = pair.expected(jobs)
    ending = [job for job, (answer,) in zip(jobs, answers, strict=True) if _ended(answer)]
    assert len(ending) >= 3
    pair.check_identical([*ending, *ending, jobs[0]])


def _ended(answer: Answer) -> bool:
    return answer.finish_reason == "stop" and answer.tokens[-1] == EOS and len(answer.tokens) > 5
