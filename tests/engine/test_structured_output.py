"""Grammars: the scheduler cuts drafts that break them, and the text is that of plain vLLM."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.engine.byte_models import WHOLE_LETTERS
from tests.engine.harness import Job, Pair, greedy, prompt

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "sizes": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 5},
        "name": {"type": "string", "pattern": "^[a-z]{3,9}$"},
    },
    "required": ["colour", "sizes", "name"],
    "additionalProperties": False,
}
REGEX = r"[a-f]{4,20}-\d{3}(,[xyz]{2}){3,9}"


def _job(seed: int, max_tokens: int = 120, **grammar: Any) -> Job:
    from vllm.sampling_params import StructuredOutputsParams

    structured = StructuredOutputsParams(**grammar)
    parameters = greedy(max_tokens, ignore_eos=False, structured_outputs=structured)
    # A prompt that ends within a character would be given back before the text.
    text = [*prompt(10 + seed, seed), WHOLE_LETTERS + seed]
    return Job(text, parameters, arrives=seed)


def test_regular_expressions(pair: Pair) -> None:
    jobs = [_job(seed, regex=REGEX) for seed in range(4)]
    # Requests without a grammar beside them give the draft something it can guess.
    pair.check_identical([*jobs, Job(prompt(20), greedy(60))])
    for (answer,) in pair.ssd.run(jobs):
        assert re.fullmatch(REGEX, answer.text)
        assert answer.finish_reason == "stop"


def test_json_schemas(pair: Pair) -> None:
    jobs = [_job(seed, json=SCHEMA) for seed in range(4)]
    pair.check_identical([*jobs, Job(prompt(20), greedy(60))])
    for (answer,) in pair.ssd.run(jobs):
        assert json.loads(answer.text).keys() == {"colour", "sizes", "name"}


@pytest.mark.parametrize("max_tokens", [1, 7, 25])
def test_grammars_cut_short_by_the_length(pair: Pair, max_tokens: int) -> None:
    jobs = [_job(seed, max_tokens, regex="([a-z]{3} ){20}") for seed in range(3)]
    pair.check_identical([*jobs, Job(prompt(20), greedy(60))])
