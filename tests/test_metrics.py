"""What the worker has counted is on ``/metrics``, under the names that the documents give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, generate_latest
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from vllm_ssd.metrics import _Metrics
from vllm_ssd.stats_file import Snapshot

LABELS = {"model_name": "target", "engine": "0"}


@pytest.fixture
def metrics() -> Iterator[_Metrics]:
    unregister_vllm_metrics()  # of engines in other tests
    yield _Metrics(LABELS, 3)
    unregister_vllm_metrics()


def snapshot(**counters: float) -> Snapshot:
    return Snapshot(counters, {}, {}, [])


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"vllm:{name}", {**LABELS, **labels})


def test_counters_of_the_v2_runner_are_there_before_they_count(metrics: _Metrics) -> None:
    shown = generate_latest(REGISTRY).decode()
    for name in ("filled_tokens", "texts_lost"):
        assert f'vllm:ssd_{name}_total{{engine="0",model_name="target"}} 0.0' in shown
    assert value("ssd_misses_total", reason="cannot_draft") == 0.0


def test_what_was_counted_since_is_added(metrics: _Metrics) -> None:
    metrics.update(snapshot(tokens_filled=5.0, misses_cannot_draft=2.0))
    metrics.update(snapshot(tokens_filled=9.0, misses_cannot_draft=2.0, texts_lost=1.0))
    assert value("ssd_filled_tokens_total") == 9.0
    assert value("ssd_misses_total", reason="cannot_draft") == 2.0
    assert value("ssd_misses_total", reason="no_branch") == 0.0
    assert value("ssd_texts_lost_total") == 1.0


def test_tokens_of_the_text_are_counted_apart_from_the_drafts(metrics: _Metrics) -> None:
    metrics.update(
        snapshot(tokens_drafted=10.0, tokens_accepted=6.0, ngram_tokens=4.0, ngram_accepted=1.0)
    )
    assert value("ssd_draft_tokens_total", source="ngram") == 4.0
    assert value("ssd_draft_tokens_total", source="branch") == 6.0
    assert value("ssd_accepted_tokens_total", source="branch") == 5.0
