"""Plain answers and one SSD engine, shared by the tests that only disturb it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm import LLM

from tests.robustness import harness
from tests.robustness.harness import Decoding
from tests.tiny_models import TinyModels

TEXTS = harness.prompts(4)
MAX_TOKENS = 48
LONG_TEXT = harness.prompts(5)[-1]
LONG_TOKENS = 900
"""Of a request that outlives the start of a draft."""


@pytest.fixture(scope="session")
def plain_answers(tiny_pair: TinyModels) -> list[list[int]]:
    """The answers of vLLM without speculation to ``TEXTS``, then to ``LONG_TEXT``."""
    with harness.running_engine(tiny_pair) as llm:
        answers = Decoding(llm, TEXTS, MAX_TOKENS).finish()
        return answers + Decoding(llm, [LONG_TEXT], LONG_TOKENS).finish()


@pytest.fixture
def expected(plain_answers: list[list[int]]) -> list[list[int]]:
    """The right answers to ``TEXTS``."""
    return plain_answers[:-1]


@pytest.fixture
def expected_long(plain_answers: list[list[int]]) -> list[int]:
    """The right answer to ``LONG_TEXT``."""
    return plain_answers[-1]


@pytest.fixture(scope="module")
def engine(tiny_pair: TinyModels, plain_answers: list[list[int]]) -> Iterator[LLM]:
    """An SSD engine in this process whose draft is the target, so that a healthy one hits."""
    with harness.running_engine(tiny_pair, harness.ssd_options(tiny_pair.itself)) as llm:
        yield llm
