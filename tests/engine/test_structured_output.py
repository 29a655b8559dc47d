"""Grammars: the scheduler cuts drafts that break them, and the text is that of plain vLLM."""

from __future__ import annotations

import json
import re

import pytest

from tests.engine.grammars import REGEX, SCHEMA, with_grammar
from tests.engine.harness import Job, Pair, greedy, prompt


def test_regular_expressions(pair: Pair) -> None:
    jobs = [with_grammar(seed, regex=REGEX) for seed in range(4)]
    # Requests without a grammar beside them give the draft something it can guess.
    pair.check_identical([*jobs, Job(prompt(20), greedy(60))])
    for (answer,) in pair.ssd.run(jobs):
        assert re.fullmatch(REGEX, answer.text)
        assert answer.finish_reason == "stop"


def test_json_schemas(pair: Pair) -> None:
    jobs = [with_grammar(seed, json=SCHEMA) for seed in range(4)]
    pair.check_identical([*jobs, Job(prompt(20), greedy(60))])
    for (answer,) in pair.ssd.run(jobs):
        assert json.loads(answer.text).keys() == {"colour", "sizes", "name"}


@pytest.mark.parametrize("max_tokens", [1, 7, 25])
def test_grammars_cut_short_by_the_length(pair: Pair, max_tokens: int) -> None:
    jobs = [with_grammar(seed, max_tokens, regex="([a-z]{3} ){20}") for seed in range(3)]
    pair.check_identical([*jobs, Job(prompt(20), greedy(60))])
