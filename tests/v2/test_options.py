"""Options that have no effect with vLLM's V2 runner are named at the start."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_ssd.config import SSDConfig
from vllm_ssd.preflight import warn_of_v2_options


def options(**given: Any) -> SSDConfig:
    return SSDConfig.parse({"model": "draft", "num_speculative_tokens": 3, **given})


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.vllm_ssd")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_one_warning_names_them_and_what_to_do(said: list[str]) -> None:
    warn_of_v2_options(options(max_wait_ms=5.0, backup="draft", pad_misses=False, branches=4))
    (warning,) = said
    assert "backup = 'draft', max_wait_ms = 5.0, pad_misses = False; " in warning
    assert "branches" not in warning
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in warning


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"backup": "ngram"},
        {"draft_sampling": "probabilistic", "draft_top_n": 32, "saguaro_c": 0.5},
        {"backup": "none", "max_wait_ms": 0.0, "pad_misses": True, "draft_sampling": "greedy"},
        {"strict": True, "fan_out": 2},
    ],
    ids=["none", "from the text", "sampled", "what it does anyway", "others"],
)
def test_there_is_no_warning_without_a_reason(said: list[str], given: dict[str, Any]) -> None:
    warn_of_v2_options(options(**given))
    assert said == []
