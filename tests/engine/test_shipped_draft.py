"""The draft that ships with the package predicts SmolLM2 as well as its card says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine.harness import LONG_WAIT_MS, Answer, Engine, Job, greedy
from vllm_ssd.cli.models import DemoModels
from vllm_ssd.cli.shipped import SHIPPED, WEIGHTS

QUESTIONS = [
    "Write a short story about a fox who learns to read.",
    "Tell a story about two brothers and a boat.",
    "Explain how bees make honey.",
    "Why do leaves change colour in autumn?",
    "What is the difference between weather and climate?",
    "Give me three tips for sleeping better.",
    "Write a poem about rain.",
    "How do I write a good letter of application?",
    "Describe a day in the life of a baker.",
    "Write a Python function that returns the largest of three numbers.",
]
DEPTH = 6
TOKENS = 64
FLOOR = 1.5
"""Acceptance length on the first words of answers, the hardest; its card has more texts."""
MOST_BYTES = 15_000_000


@pytest.fixture(scope="module")
def jobs(demo_pair: DemoModels) -> list[Job]:
    tokenizer = AutoTokenizer.from_pretrained(demo_pair.target)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in QUESTIONS
    ]
    return [
        Job(tokenizer.encode(text, add_special_tokens=False), greedy(TOKENS, ignore_eos=False))
        for text in texts
    ]


@contextmanager
def engine(models: DemoModels, **options: Any) -> Iterator[Engine]:
    """The target with the draft, by one of the two methods."""
    speculation = {"model": str(models.draft), "num_speculative_tokens": DEPTH, **options}
    running = Engine(
        str(models.target),
        speculative_config=speculation,
        kv_cache_memory_bytes=256 << 20,
        disable_log_stats=False,
    )
    try:
        yield running
    finally:
        running.close()


def acceptance_length(running: Engine) -> float:
    """1 + accepted / drafts, as vLLM counts them."""
    drafts = running.metric("spec_decode_num_drafts")
    assert drafts > 0
    return 1 + running.metric("spec_decode_num_accepted_tokens") / drafts


@pytest.fixture(scope="module")
def answers(
    demo_pair: DemoModels, jobs: list[Job], stop_pair: Callable[[], None]
) -> tuple[list[list[Answer]], float]:
    """The target's answers with vLLM's ``draft_model``, and the acceptance length."""
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("draft_model has the draft in float32 too, in which vLLM has no int8 with AMX")
    stop_pair()
    with engine(demo_pair, method="draft_model") as running:
        said = running.run(jobs)
        return said, acceptance_length(running)


@pytest.mark.slow
def test_its_acceptance_stays_above_a_floor(answers: tuple[list[list[Answer]], float]) -> None:
    assert answers[1] > FLOOR


@pytest.mark.slow
def test_ssd_drafts_with_it_from_its_own_vocabulary(
    demo_pair: DemoModels, jobs: list[Job], answers: tuple[list[list[Answer]], float]
) -> None:
    with engine(demo_pair, method="ssd", max_wait_ms=LONG_WAIT_MS, strict=True) as running:
        assert running.run(jobs) == answers[0]
        assert acceptance_length(running) > FLOOR
        assert running.stats()["hits"] > 0


def test_it_is_small_and_its_card_names_its_origin() -> None:
    assert (SHIPPED / WEIGHTS).stat().st_size <= MOST_BYTES
    card = (SHIPPED / "README.md").read_text()
    assert "Apache-2.0" in card
    assert "SmolLM2-135M-Instruct" in card
