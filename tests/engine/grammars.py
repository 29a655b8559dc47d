"""Requests with a grammar."""

from __future__ import annotations

from typing import Any

from tests.engine.byte_models import WHOLE_LETTERS
from tests.engine.harness import Job, greedy, prompt

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


def with_grammar(seed: int, max_tokens: int = 120, **grammar: Any) -> Job:
    """A request with a grammar, for models that can write any text (``byte_models``)."""
    from vllm.sampling_params import StructuredOutputsParams

    structured = StructuredOutputsParams(**grammar)
    parameters = greedy(max_tokens, ignore_eos=False, structured_outputs=structured)
    # A prompt that ends within a character would be given back before the text.
    text = [*prompt(10 + seed, seed), WHOLE_LETTERS + seed]
    return Job(text, parameters, arrives=seed)
