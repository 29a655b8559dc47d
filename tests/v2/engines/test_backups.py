"""Where the draft lacks tokens, those of the text are verified in their place; answers stay."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.harness import Job, greedy, prompt
from tests.tiny_models import TinyModels
from tests.v2.engines.harness import answers, running

REPEATING = [1, *(prompt(9, salt=3)[1:] * 6)]
"""A text in which n-grams are found."""


def jobs() -> list[Job]:
    ends: dict[str, Any] = {"ignore_eos": False, "stop_token_ids": list(range(100, 140))}
    return [
        *(Job(REPEATING[: 30 + n], greedy(32), arrives=7 * n) for n in range(2)),
        Job(prompt(9, 1), greedy(32), arrives=3),
        Job(REPEATING[:25], greedy(32, **ends)),
    ]


@pytest.mark.parametrize("backup", ["ngram", pytest.param("auto", marks=pytest.mark.slow), "none"])
def test_greedy_answers_are_the_same_whatever_fills_up(
    tiny_pair: TinyModels, asynchronous: bool, backup: str
) -> None:
    with running(tiny_pair, None, asynchronous=False) as plain:
        expected = plain.run(jobs())
    with running(tiny_pair, "random", asynchronous, options={"backup": backup}) as engine:
        answered, grown = answers(engine, jobs())
    print({name: value for name, value in grown.items() if value})
    assert answered == expected
    assert grown["tokens_filled"] > 0
    if backup == "none":
        assert grown["ngram_proposals"] == grown["drafted_ngram"] == 0
    else:
        assert grown["ngram_proposals"] > 10
        assert 0 < grown["accepted_ngram"] < grown["drafted_ngram"]
