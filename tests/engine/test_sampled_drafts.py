"""Sampled drafts: what is written has the target's distribution, by chi-square tests.

Each run tests the first four tokens of its texts, and each with the one before, against
probabilities that are exact: all texts of the tiny target are enumerated.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.decisions import AtAPrice, InTurns
from tests.engine.all_texts import AllTexts
from tests.engine.few_tokens import LETTERS, TOKENS, few_token_models
from tests.engine.harness import Engine
from tests.engine.sampled_runs import (
    LENGTH,
    PROMPT,
    SURELY_WRONG,
    Sampled,
    check,
    sampling_engine,
)
from tests.engine.wrong_draft import drafts_with
from tests.tiny_models import EOS, TinyModels
from vllm_ssd.target.decisions import Decisions
from vllm_ssd.target.pace import Pace
from vllm_ssd.target.waiting import Waiting

FEW = 4_000
"""Requests of the tests that are not slow."""
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Models of few tokens."""
    return few_token_models(tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def exact(few: TinyModels) -> AllTexts:
    """All texts of the target."""
    return AllTexts(few.target, PROMPT, LENGTH)


@pytest.fixture(autouse=True, scope="module")
def _alone(stop_pair: Callable[[], None]) -> None:
    stop_pair()


# ---- in the default suite: one engine


@pytest.fixture(scope="module")
def weighing(few: TinyModels) -> Iterator[Engine]:
    """An engine with a draft that guesses some of the target's tokens, and C = 0.3."""
    with sampling_engine(few, "near", saguaro_c=0.3) as engine:
        yield engine


def test_sampled_drafts_do_not_change_the_distribution(weighing: Engine, exact: AllTexts) -> None:
    check(weighing, exact, FEW, temperature=0.8, top_p=0.9).assert_sampled()


@pytest.mark.slow
def test_a_wrong_temperature_is_found(
    weighing: Engine, exact: AllTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_ssd.core.distributions import Distributions

    look_up = Distributions.look_up

    def at_temperature_1(self: Any, rows: Any, positions: Any) -> Any:
        supports, tokens, values = look_up(self, rows, positions)
        wrong = values**0.4
        sampled = supports[supports > 0]
        totals = np.add.reduceat(wrong, sampled.cumsum() - sampled) if len(sampled) else sampled
        return supports, tokens, (wrong / np.repeat(totals, sampled)).astype(np.float32)

    monkeypatch.setattr(Distributions, "look_up", at_temperature_1)
    found = Sampled(weighing, FEW, temperature=0.4)
    found.assert_sampled()
    assert min(exact.p_values(found.texts, found.params)) < SURELY_WRONG


def test_what_vllm_refuses_with_speculation_is_refused_and_the_engine_lives_on(
    weighing: Engine, exact: AllTexts
) -> None:
    from vllm.exceptions import VLLMValidationError

    for refused in ({"min_p": 0.1}, {"logit_bias": {5: 1.0}}):
        with pytest.raises(VLLMValidationError, match="not yet supported with speculative"):
            Sampled(weighing, 10, temperature=1.0, **refused)
    found = Sampled(weighing, 200, temperature=1.0)
    found.assert_sampled()
    assert min(exact.p_values(found.texts, found.params)) > SURELY_WRONG


def test_custom_logits_processors_get_vllms_own_error(few: TinyModels) -> None:
    processors = ["vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor"]
    with (
        pytest.raises(ValueError, match="not supported when speculative decoding is enabled"),
        sampling_engine(few, "near", {"logits_processors": processors}),
    ):
        pass


def test_first_choices_are_drafted_where_end_tokens_could_not_all_be_left_out(
    weighing: Engine, exact: AllTexts
) -> None:
    # More end tokens than the draft checks: nothing is sampled, and the distribution is the same.
    ends = list(range(3, 13))
    found = check(weighing, exact, FEW // 2, ends, temperature=1.2, stop_token_ids=ends)
    assert found.stats["tokens_with_probabilities"] == 0
    assert found.stats["tokens_accepted"] > 0


# ---- slow: every combination that has a trap of its own

FEW_AT_ONCE = {"max_num_seqs": 24}
"""So that the draft has most texts when it is waited for."""

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "near-C1": ("near", {"saguaro_c": 1.0}),
    "near-C0.3": ("near", {"saguaro_c": 0.3}),
    "near-C0": ("near", {"saguaro_c": 0.0}),
    "random-C1": ("random", {"saguaro_c": 1.0, "branches": 16}),
    "random-C0": ("random", {"saguaro_c": 0.0, "branches": 16}),
    "itself-C0.3": ("itself", {"saguaro_c": 0.3}),
    "itself-C0": ("itself", {"saguaro_c": 0.0}),
    "auto": ("near", {"saguaro_c": "auto", "draft_sampling": "auto"}),
    # Seven tokens at most, and whatever there is of them after a wait that is too short for all.
    "ragged": ("near", {"num_speculative_tokens": 7, "max_wait_ms": 30.0, "branches": 4}),
    "top-n": ("near", {"draft_top_n": 4}),
    "padded": ("near", {"pad_misses": True}),
    "backup-ngram": ("near", {"backup": "ngram"}),
    "backup-draft": ("near", {"backup": "draft"}),
}


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, few: TinyModels) -> Iterator[Engine]:
    """One of the engines."""
    draft, options = ENGINES[request.param]
    engine_options = FEW_AT_ONCE if options.get("backup") == "draft" else {}
    with sampling_engine(few, draft, engine_options, **options) as running:
        yield running


EVERY: dict[str, dict[str, Any]] = {
    "t0.4": {"temperature": 0.4},
    "t1": {"temperature": 1.0},
    "t1.5": {"temperature": 1.5},
    "others": {"temperature": 1.0, "temperatures": (0.0, 0.4, 1.5)},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-p": {"temperature": 1.0, "top_p": 0.7},
    "both": {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    "presence": {"temperature": 0.7, "presence_penalty": 1.0},
    "bad-words": {"temperature": 1.0, "bad_words": ["a", "bc", "q"]},
    "ends": {"temperature": 1.0, "stop_token_ids": [4, 7, 13], "ends": [4, 7, 13]},
    "min-tokens": {
        "temperature": 1.0,
        "stop_token_ids": [4, 7, 13],
        "min_tokens": 2,
        "ends": [4, 7, 13],
    },
}


@slow
@pytest.mark.parametrize("engine", ["near-C0.3"], indirect=True)
@pytest.mark.parametrize("parameters", EVERY.values(), ids=EVERY)
def test_the_distribution_with_all_parameters(
    engine: Engine, exact: AllTexts, parameters: dict[str, Any]
) -> None:
    check(engine, exact, **parameters).assert_sampled()


@slow
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("name", ["t0.4", "t1", "ends"])
def test_the_distribution_with_all_drafts(engine: Engine, exact: AllTexts, name: str) -> None:
    check(engine, exact, **EVERY[name]).assert_sampled()


@slow
def test_the_distribution_with_waits_that_pay_now_and_then(
    few: TinyModels, exact: AllTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By what is measured they never would beside so small a target.
    patience = itertools.cycle([0.3, 0.3, 0.3, 0.3, 0.0])
    monkeypatch.setattr(Waiting, "_patience", lambda *_: (0.3, next(patience)))
    with sampling_engine(few, "near", FEW_AT_ONCE, backup="auto") as engine:
        stats = check(engine, exact, temperature=1.0).stats
        assert min(stats["waited_tokens"], stats["tokens_with_probabilities"]) > 200


@slow
@pytest.mark.parametrize("kind", [AtAPrice, InTurns])
def test_the_distribution_where_it_is_decided_how_much_is_verified(
    few: TinyModels, exact: AllTexts, monkeypatch: pytest.MonkeyPatch, kind: type[Decisions]
) -> None:
    # By what is measured nothing would ever be verified beside so small a target.
    monkeypatch.setattr(Pace, "price", 0.35)
    monkeypatch.setattr(Pace, "once", 0.5)
    with sampling_engine(few, "near", saguaro_c=0.3) as engine:
        rounds = engine.drafter.rounds
        rounds.decisions = kind(rounds.requests, rounds.pace, rounds.stats)
        found = check(engine, exact, temperature=1.0)
        found.assert_sampled()
        assert 0.1 < found.stats["tokens_chosen"] / found.stats["tokens_found"] < 0.9


@slow
def test_the_distribution_with_preemption(few: TinyModels, exact: AllTexts) -> None:
    # Each text takes two blocks in the end, and there are not so many.
    long_enough = {"max_num_seqs": 32, "num_gpu_blocks_override": 40, "block_size": 32}
    with sampling_engine(few, "near", long_enough, saguaro_c=0.3) as engine:
        text = [*PROMPT[:1], *(3 + i % 20 for i in range(20)), *PROMPT[1:]]
        found = check(engine, AllTexts(few.target, text, LENGTH), temperature=1.0, prompt=text)
        found.assert_sampled()
        assert engine.metric("num_preemptions") > 100


REGEX = "(a|b)[c-m]|[c-h](e|f)[a-u]|[i-u][a-u][k-u]?"


@cache
def _may_follow() -> dict[tuple[int, ...], list[int]]:
    """The tokens that may follow each beginning of a text of the grammar."""
    tokens = {letter: 3 + i for i, letter in enumerate(LETTERS)}
    texts = ("".join(text) for n in (2, 3) for text in itertools.product(LETTERS, repeat=n))
    following: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for text in filter(re.compile(REGEX).fullmatch, texts):
        ids = [*(tokens[letter] for letter in text), EOS]
        for n, token in enumerate(ids):
            following[tuple(ids[:n])].add(token)
    return {text: sorted(tokens) for text, tokens in following.items()}


def by_the_grammar(texts: torch.Tensor) -> torch.Tensor:
    """The tokens that the grammar lets follow each text, ``[n, vocabulary]``."""
    allowed = torch.zeros(len(texts), TOKENS, dtype=torch.bool)
    for row, text in zip(allowed, texts.tolist(), strict=True):
        row[_may_follow().get(tuple(text), [])] = True
    return allowed


@slow
@pytest.mark.parametrize("engine", ["near-C0.3"], indirect=True)
def test_the_distribution_with_a_grammar(engine: Engine, exact: AllTexts) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    found = check(
        engine,
        exact,
        ends=[EOS],
        allowed=by_the_grammar,
        temperature=1.0,
        ignore_eos=False,
        structured_outputs=StructuredOutputsParams(regex=REGEX),
        temperatures=(1.0,),  # beside them, drafts are sampled
    )
    assert found.stats["tokens_with_probabilities"] > 0


@slow
@pytest.mark.parametrize("mistake", ["temperature", "C", "end tokens"])
def test_mistakes_of_the_draft_are_found(
    few: TinyModels, exact: AllTexts, mistake: str, tmp_path: Path
) -> None:
    parameters = {
        "temperature": {"temperature": 0.4},
        "C": {"temperature": 1.0},
        "end tokens": EVERY["ends"],
    }[mistake]
    ends = parameters.pop("ends", ())
    with (
        drafts_with(mistake, tmp_path),
        sampling_engine(few, "near", saguaro_c=0.0) as engine,
    ):
        found = Sampled(engine, FEW, **parameters)
        found.assert_sampled()
        assert min(exact.p_values(found.texts, found.params, ends)) < SURELY_WRONG


@slow
def test_all_ranks_verify_by_the_same_probabilities(
    few: TinyModels, exact: AllTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    both: dict[str, Any] = {"tensor_parallel_size": 2}
    with sampling_engine(few, "near", both, saguaro_c=0.3) as engine:
        check(engine, exact, temperature=1.0).assert_sampled()
