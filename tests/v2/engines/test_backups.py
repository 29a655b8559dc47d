"""Where the draft lacks tokens, those of the text are verified in their place; answers stay."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.few_tokens import TOKENS, few_token_models
from tests.engine.harness import Job, greedy
from tests.tiny_models import TinyModels
from tests.v2.engines.harness import answers, running

ENGINE: dict[str, Any] = {"max_model_len": 96}
PARAMETERS: list[dict[str, Any]] = [
    {},
    {},
    {"ignore_eos": False, "stop_token_ids": [5, 17]},
    {"repetition_penalty": 1.1},
]
JOBS = [
    Job([1, *([4 + i, 9, 20 - i, 7, 12] * 4)], greedy(40, **more), arrives=5 * i)
    for i, more in enumerate(PARAMETERS)
]
"""Texts of few different tokens, in which n-grams are found."""


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Models of few tokens."""
    assert TOKENS == 24
    return few_token_models(tmp_path_factory.mktemp("few"))


@pytest.mark.parametrize("backup", ["ngram", pytest.param("none", marks=pytest.mark.slow)])
def test_greedy_answers_are_the_same_whatever_fills_up(
    few: TinyModels, asynchronous: bool, backup: str
) -> None:
    with running(few, None, asynchronous=False, **ENGINE) as plain:
        expected = plain.run(JOBS)
    with running(few, "random", asynchronous, options={"backup": backup}, **ENGINE) as engine:
        answered, grown = answers(engine, JOBS)
    print({name: value for name, value in grown.items() if value})
    assert answered == expected
    assert grown["tokens_filled"] > 0
    if backup == "none":
        assert grown["ngram_proposals"] == grown["drafted_ngram"] == 0
    else:
        assert grown["ngram_proposals"] > 20
        assert 0 < grown["accepted_ngram"] < grown["drafted_ngram"]
