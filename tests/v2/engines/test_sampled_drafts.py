"""What is sampled has the target's distribution when drafts are sampled too: chi-square tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.all_texts import AllTexts
from tests.engine.few_tokens import few_token_models
from tests.engine.harness import Engine
from tests.engine.sampled_runs import LEAST_P, LENGTH, PROMPT, SURELY_WRONG, Sampled
from tests.tiny_models import TinyModels
from tests.v2.engines.harness import runner_of, running

pytestmark = pytest.mark.slow

REQUESTS = 800
ENGINE: dict[str, Any] = {"max_num_seqs": 96, "max_model_len": 64, "max_num_batched_tokens": 512}
OPTIONS: dict[str, Any] = {"draft_sampling": "probabilistic", "backup": "auto"}


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
    """An engine whose draft samples wherever it may."""
    with running(few, "near", asynchronous=True, options=OPTIONS, **ENGINE) as engine:
        yield engine


def sampled(engine: Engine, requests: int = REQUESTS, **parameters: Any) -> Sampled:
    """Many short texts; this proves nothing unless q' was used."""
    found = Sampled(engine, requests, seed=1, **parameters)
    stats = found.stats
    print({name: stats[name] for name in sorted(stats) if stats[name]})
    assert stats["tokens_with_probabilities"] > 0.3 * stats["tokens_drafted"] > requests / 5
    assert min(stats["tokens_accepted"], stats["rejections"]) > requests / 10
    assert stats["errors"] == stats["texts_lost"] == stats["resyncs"] == 0
    return found


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_samples_follow_the_targets_distribution(
    engine: Engine, exact: AllTexts, temperature: float
) -> None:
    found = sampled(engine, temperature=temperature)
    values = exact.p_values(found.texts, found.params)
    print(values)
    assert min(values) > LEAST_P
    assert len(found.greedy) == 1


def test_a_wrong_distribution_is_found(
    engine: Engine, exact: AllTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the sampled tokens had been drawn from something flatter than they were."""
    rows = runner_of(engine).speculator._sampling._rows
    write = rows.write

    def wrong(slots: Any, drafts: Any, temperature: Any) -> None:
        write(slots, drafts._replace(logs=drafts.logs * 0.2), temperature)

    monkeypatch.setattr(rows, "write", wrong)
    found = sampled(engine, temperature=1.0)
    assert min(exact.p_values(found.texts, found.params)) < SURELY_WRONG


@pytest.mark.usefixtures("in_processes")
def test_all_ranks_have_the_same_distributions(few: TinyModels, exact: AllTexts) -> None:
    with running(
        few, "near", asynchronous=True, options=OPTIONS, tensor_parallel_size=2, **ENGINE
    ) as engine:
        found = sampled(engine, REQUESTS // 2, temperature=1.0)
    values = exact.p_values(found.texts, found.params)
    print(values)
    assert min(values) > LEAST_P
    assert len(found.greedy) == 1
