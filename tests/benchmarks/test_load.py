"""A steady load: what is counted, and how rounds become one rate."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.engines import (
    Engine,
    add_arguments,
    draft_model,
    loads,
    ssd,
    ssd_engine,
    take_turns,
)
from benchmarks.load import Case, Measured, Streams, added
from benchmarks.rates import Rate, Ratio, Slice
from tests.tiny_models import TinyModels
from vllm_ssd.cli.engine_process import EngineError, EngineSpec, run_apart, start_engine
from vllm_ssd.cli.models import DemoModels

LIMIT = 8


class Watched(NamedTuple):
    """An engine, and what it was asked to do."""

    engine: Any
    asked: list[int]
    """The last token of every prompt."""
    limits: list[int]
    """``max_tokens`` of every request."""
    running: list[int]
    """Requests in every step."""


@pytest.fixture(scope="module")
def engine(tiny_pair: TinyModels) -> Any:
    spec = EngineSpec(
        model=str(tiny_pair.target),
        speculative_config=None,
        enforce_eager=True,
        dtype="float32",
    )
    return start_engine(spec, max_model_len=64, kv_cache_memory_bytes=16 << 20)


@pytest.fixture
def watched(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Watched:
    asked: list[int] = []
    limits: list[int] = []
    running: list[int] = []
    add, step = engine.add_request, engine.step

    def add_request(name: str, prompt: dict[str, list[int]], parameters: Any) -> None:
        asked.append(prompt["prompt_token_ids"][-1])
        limits.append(parameters.max_tokens)
        add(name, prompt, parameters)

    def counted_step() -> Any:
        running.append(engine.get_num_unfinished_requests())
        return step()

    monkeypatch.setattr(engine, "add_request", add_request)
    monkeypatch.setattr(engine, "step", counted_step)
    return Watched(engine, asked, limits, running)


@contextmanager
def streams(engine: Any, size: int) -> Iterator[Streams]:
    prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    running = Streams(engine, prompts, size, LIMIT, temperature=0.0)
    yield running
    running.abort()
    assert not engine.has_unfinished_requests()


def test_all_requests_run_at_every_step_that_is_counted(watched: Watched) -> None:
    with streams(watched.engine, 4) as load:
        counted = sum(load.run(4).tokens for _ in range(5))
        assert set(watched.running) == {4}
        # Every step yields a token of each, but for those that have just begun.
        assert 0 <= sum(watched.running) - counted <= len(watched.asked)


def test_prompts_come_in_the_order_of_the_list_and_begin_again(watched: Watched) -> None:
    with streams(watched.engine, 2) as load:
        load.run(12)
    expected = itertools.cycle([5, 7, 11])
    assert watched.asked == [last for last, _ in zip(expected, watched.asked, strict=False)]
    assert len(watched.asked) >= 14


def test_first_answers_are_cut_at_different_lengths_and_no_others(watched: Watched) -> None:
    with streams(watched.engine, 4) as load:
        load.run(6)
    assert watched.limits[:4] == [2, 4, 6, 8]
    assert set(watched.limits[4:]) == {LIMIT}


def test_a_run_ends_with_the_step_in_which_its_last_answer_does(watched: Watched) -> None:
    with streams(watched.engine, 1) as load:
        first, others = load.run(1), load.run(2)
    assert (first.tokens, others.tokens) == (LIMIT, 2 * LIMIT)
    assert first.seconds > 0.0


def test_as_many_answers_are_counted_as_wanted_and_two_a_stream() -> None:
    options = argparse.Namespace(answers=24, sizes=[1, 7, 16])
    found = loads(["Who are you?"], options)
    assert [(load.size, load.answers) for load in found] == [(1, 24), (7, 24), (16, 32)]


def test_rate_of_one_round_is_its_tokens_by_its_seconds() -> None:
    found = Rate.of([Slice(150, 3.0)])
    assert found == (50.0, [50.0])
    assert str(found) == "50.0"


def test_rate_of_several_rounds_is_that_of_all_their_time() -> None:
    found = Rate.of([Slice(100, 1.0), Slice(100, 4.0)])
    assert found == (40.0, [100.0, 25.0])
    assert str(found) == "40.0 ±94%"


def test_engines_are_compared_round_by_round() -> None:
    """What slowed down both in one round is not in their ratio, nor in its error."""
    one, other = Rate(60.0, [60.0, 30.0, 66.0]), Rate(50.0, [50.0, 25.0, 55.0])
    found = Ratio.of(one, other)
    assert [found.mean, found.error] == pytest.approx([1.2, 0.0])
    assert (str(found), found.difference()) == ("1.20 ±0.00", "+20.0% ±0.0%")
    found = Ratio.of(Rate(1.0, [1.0, 4.0]), Rate(1.0, [1.0, 1.0]))
    assert [found.mean, found.error] == pytest.approx([2.0, math.log(2.0)])
    assert str(Ratio.of(Rate(3.0, [3.0]), Rate(2.0, [2.0]))) == "1.50"


def test_counters_of_the_rounds_are_added() -> None:
    rounds = [
        Measured(Slice(1, 1.0), {"drafts": 2.0}),
        Measured(Slice(1, 1.0), {"drafts": 3.0, "hits": 1.0}),
    ]
    assert added(rounds) == {"drafts": 5.0, "hits": 1.0}


@pytest.mark.slow
def test_engines_that_are_up_together_take_turns_on_the_cores_they_were_given(
    demo_pair: DemoModels,
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["--rounds", "2", "--max-tokens", "8", "--dtype", "float32"])
    cases = [Case(["Who are you?", "Write a poem."], size, 2 * size) for size in (1, 3)]
    config = draft_model(str(demo_pair.draft), 2)
    found = take_turns([Engine("plain"), Engine("drafts", config, [0])], cases, options)
    for name, of_cases in found.items():
        for case, rounds in zip(cases, of_cases, strict=True):
            assert len(rounds) == 2
            assert all(8 <= one.slice.tokens <= 32 * case.size for one in rounds)
            assert all(("drafts" in one.counters) == (name == "drafts") for one in rounds)


@pytest.mark.slow
def test_vllms_own_method_accepts_what_it_should_above_temperature_0(demo_pair: DemoModels) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["--rounds", "1", "--max-tokens", "32", "--temperature", "0.7"])
    itself = Engine("itself", draft_model(str(demo_pair.target), 2, options.temperature))
    (of_case,) = take_turns([itself], [Case(["Who are you?"], 1, 4)], options)["itself"]
    counters = of_case[0].counters
    assert counters["accepted_tokens"] >= 0.9 * counters["draft_tokens"] > 0


@pytest.mark.slow
def test_settings_that_share_an_engine_are_measured_apart(demo_pair: DemoModels) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["--rounds", "2", "--max-tokens", "16"])
    settings: dict[str, dict[str, Any]] = {
        "short": {"num_speculative_tokens": 1, "backup": "none"},
        "long": {"num_speculative_tokens": 4, "backup": "none"},
    }
    cases = [Case(["Who are you?", "Write a poem."], 1, 2)]
    with ssd_engine(str(demo_pair.draft), settings, options) as engine:
        found = take_turns([engine], cases, options)
    assert list(found) == list(settings)
    for name, (rounds,) in found.items():
        counters = added(rounds)
        assert counters["look_ups"] >= counters["hits"] > 0
        most = settings[name]["num_speculative_tokens"] * counters["drafts"]
        assert 0 < counters["draft_tokens"] <= most
        assert all(0 < one.slice.tokens <= 2 * 16 + 16 for one in rounds)


@pytest.mark.slow
def test_a_target_on_other_cores_than_it_should_be_is_not_measured(demo_pair: DemoModels) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    ssd_engine = Engine("SSD", ssd(str(demo_pair.draft), {"num_speculative_tokens": 2}), [0, 1])
    with pytest.raises(RuntimeError, match=r"SSD runs on cores \[0\], not on \[0, 1\]"):
        take_turns([ssd_engine], [Case(["Who are you?"], 1, 1)], parser.parse_args([]))


def test_an_engine_that_fails_says_why(tmp_path: Path) -> None:
    spec = EngineSpec(model=str(tmp_path), speculative_config=None, enforce_eager=True)
    with pytest.raises(EngineError, match="config"):
        run_apart(_start, spec)


def _start(spec: EngineSpec, tell: Any) -> None:
    start_engine(spec)
