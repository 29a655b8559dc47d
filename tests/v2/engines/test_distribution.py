"""What is sampled has the target's distribution: chi-square tests of the first four tokens, and of
each with the one before, against probabilities that are exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.engine.all_texts import AllTexts
from tests.engine.few_tokens import few_token_models
from tests.engine.harness import Engine
from tests.engine.sampled_runs import (
    LEAST_HITS,
    LEAST_P,
    LENGTH,
    PROMPT,
    SURELY_WRONG,
    Sampled,
)
from tests.tiny_models import TinyModels
from tests.v2.engines.harness import DEPTH, runner_of, running

pytestmark = pytest.mark.slow

REQUESTS = 800
"""So few because the interpreter takes minutes for them."""
ENGINE: dict[str, Any] = {"max_num_seqs": 96, "max_model_len": 64, "max_num_batched_tokens": 512}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Models of few tokens."""
    return few_token_models(tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def exact(few: TinyModels) -> AllTexts:
    """All texts of the target."""
    return AllTexts(few.target, PROMPT, LENGTH)


@pytest.fixture(scope="module")
def engine(few: TinyModels) -> Iterator[Engine]:
    """An engine with a draft that guesses some of the target's tokens."""
    with running(few, "near", asynchronous=True, **ENGINE) as engine:
        yield engine


def sampled(engine: Engine, **parameters: Any) -> Sampled:
    """Many short texts; this proves nothing without hits and acceptances."""
    found = Sampled(engine, REQUESTS, seed=1, **parameters)
    stats = found.stats
    print(f"hits {found.hit_rate:.2f}", {name: stats[name] for name in COUNTED})
    assert len(found.texts) == REQUESTS
    assert found.hit_rate > LEAST_HITS
    assert min(stats["tokens_accepted"], stats["rejections"]) > REQUESTS / 5
    assert stats["errors"] == stats["texts_lost"] == stats["resyncs"] == 0
    return found


COUNTED = ("look_ups", "tokens_drafted", "tokens_accepted", "verifications", "rejections")


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_samples_follow_the_targets_distribution(
    engine: Engine, exact: AllTexts, temperature: float
) -> None:
    found = sampled(engine, temperature=temperature)
    values = exact.p_values(found.texts, found.params)
    print(values)
    assert min(values) > LEAST_P
    assert len(found.greedy) == 1


def test_drafts_that_are_always_accepted_are_found(engine: Engine, exact: AllTexts) -> None:
    sampler = runner_of(engine).rejection_sampler
    sampler.synthetic_conditional_rates = torch.ones(DEPTH)
    try:
        found = Sampled(engine, REQUESTS // 4, seed=1, temperature=1.0)
    finally:
        sampler.synthetic_conditional_rates = None
    assert found.stats["rejections"] == 0
    assert min(exact.p_values(found.texts, found.params)) < SURELY_WRONG


@pytest.mark.usefixtures("two_workers")
def test_all_ranks_verify_alike(few: TinyModels, exact: AllTexts) -> None:
    with running(few, "near", asynchronous=True, tensor_parallel_size=2, **ENGINE) as engine:
        found = sampled(engine, temperature=1.0)
    values = exact.p_values(found.texts, found.params)
    print(values)
    assert min(values) > LEAST_P
    assert len(found.greedy) == 1
