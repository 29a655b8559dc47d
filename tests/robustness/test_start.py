"""How an engine starts: with vLLM's default memory settings, or fails with the reason."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm import LLM

from tests.robustness import harness
from tests.robustness.conftest import MAX_TOKENS, TEXTS
from tests.robustness.harness import Decoding, ssd_options
from tests.tiny_models import TinyModels
from vllm_ssd.target import draft_life
from vllm_ssd.target.client import DraftClient
from vllm_ssd.target.draft_setup import DraftPlan, plan_draft
from vllm_ssd.target.v1.worker import SSDWorker


@pytest.fixture(autouse=True)
def _cores_come_back() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    yield
    gc.collect()  # an engine that failed is not shut down
    assert os.sched_getaffinity(0) == before


def test_draft_that_does_not_load_fails_the_start_with_its_reason(
    tiny_pair: TinyModels, tmp_path: Path
) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    for file in tiny_pair.draft.iterdir():
        (draft / file.name).write_bytes(file.read_bytes())
    weights = draft / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    said = _failure(tiny_pair, draft)
    assert said.startswith("ssd: the draft process did not come up: ")
    assert "SafetensorError" in said
    _assert_no_draft()


def test_start_that_takes_too_long_is_given_up(tiny_pair: TinyModels) -> None:
    said = _failure(tiny_pair, tiny_pair.draft, draft_startup_timeout_s=0.5)
    assert "draft_startup_timeout_s = 0.5" in said
    assert "raise it or choose a smaller draft model" in said
    _assert_no_draft()


def test_draft_ends_when_the_target_does_not_start(
    tiny_pair: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    # Too little for one text of the full length: vLLM itself refuses, after the draft has started.
    said = _failure(tiny_pair, tiny_pair.draft, engine={"kv_cache_memory_bytes": 1 << 16})
    assert "memory for the cache" in said
    gc.collect()
    harness.wait_for(lambda: not _drafts(), harness.GONE_SECONDS, "the draft is gone")


@pytest.mark.slow
def test_draft_with_a_device_of_its_own_loads_beside_the_target(
    tiny_pair: TinyModels, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # There is only one CPU here; what matters is when the draft may take memory.
    monkeypatch.setattr(draft_life, "plan_draft", lambda *of: _with_its_own_device(plan_draft(*of)))
    order: list[str] = []
    for owner, name in ((DraftClient, "allocate"), (SSDWorker, "load_model")):
        monkeypatch.setattr(owner, name, _noting(order, name, getattr(owner, name)))
    with harness.running_engine(tiny_pair, ssd_options(tiny_pair.itself)) as llm:
        assert order == ["allocate", "load_model"]
        assert Decoding(llm, TEXTS, MAX_TOKENS).finish() == expected
        assert harness.stats(llm)["hits"] > 0


def test_draft_on_cpu_loads_while_the_target_does(
    tiny_pair: TinyModels, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = DraftClient.allocate

    def once_it_loads(client: DraftClient, kv_cache_memory_bytes: int) -> None:
        def loads() -> bool:
            client.poll(0.1)
            return client._doing == "loads the weights"

        harness.wait_for(loads, 60.0, "the draft loads without being asked to")
        allocate(client, kv_cache_memory_bytes)

    monkeypatch.setattr(DraftClient, "allocate", once_it_loads)
    with harness.running_engine(tiny_pair, ssd_options(tiny_pair.itself)) as llm:
        assert Decoding(llm, TEXTS, MAX_TOKENS).finish() == expected
        assert harness.stats(llm)["hits"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draft_size", "draft_length"),
    [(1 << 20, 480), (None, 1024)],
)
def test_with_an_automatic_length_no_text_is_longer_than_either_cache_holds(
    tiny_pair: TinyModels,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    draft_size: int | None,
    draft_length: int,
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    options = ssd_options(tiny_pair.itself, draft_kv_cache_memory_bytes=draft_size)
    # 2,048 bytes a token: at most 768 of 1,024 for the target.
    engine = {"max_model_len": -1, "kv_cache_memory_bytes": 3 << 19}
    with harness.running_engine(tiny_pair, options, **engine) as llm:
        length = llm.llm_engine.vllm_config.model_config.max_model_len
        assert 480 < length <= 768
        assert llm.collective_rpc(_longest_followed) == [min(length, draft_length)]
        assert Decoding(llm, TEXTS, MAX_TOKENS).finish() == expected
        assert harness.stats(llm)["hits"] > 0


@pytest.mark.slow
def test_engine_starts_with_vllms_own_choice_of_memory(
    tiny_pair: TinyModels, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    memory = psutil.virtual_memory()
    share = 0.5 * memory.available / memory.total
    options = ssd_options(tiny_pair.itself)
    with harness.running_engine(tiny_pair, options, gpu_memory_utilization=share) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        assert cache.kv_cache_memory_bytes is None
        assert Decoding(llm, TEXTS, MAX_TOKENS).finish() == expected
        assert harness.stats(llm)["hits"] > 0


@pytest.mark.slow
@pytest.mark.skipif(
    psutil.virtual_memory().available < 0.95 * psutil.virtual_memory().total,
    reason="vLLM itself starts with its defaults only where 92 % of the memory is free",
)
def test_one_liner_starts_with_all_defaults(
    tiny_pair: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    llm = LLM(
        model=str(tiny_pair.target),
        speculative_config={
            "method": "ssd",
            "model": str(tiny_pair.draft),
            "num_speculative_tokens": 6,
        },
    )
    try:
        (output,) = llm.generate(["w5 w6 w7"], harness.greedy(8), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 8
    finally:
        llm.llm_engine.engine_core.shutdown()
    harness.wait_for(lambda: not _drafts(), harness.GONE_SECONDS, "the draft is gone")


def _with_its_own_device(plan: DraftPlan) -> DraftPlan:
    return dataclasses.replace(plan, shares_device=False, kv_cache_memory_bytes=64 << 20)


def _noting(order: list[str], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, which leaves its name when it is called."""

    def call(*arguments: Any, **named: Any) -> Any:
        order.append(name)
        return method(*arguments, **named)

    return call


def _longest_followed(worker: Any) -> int:
    """The longest text an engine's worker lets its draft follow."""
    longest: int = worker._rounds.requests.max_length
    return longest


def _failure(
    models: TinyModels, draft: Path, engine: dict[str, Any] | None = None, **options: Any
) -> str:
    """The error of an engine that cannot start."""
    with pytest.raises((RuntimeError, ValueError)) as caught:
        LLM(
            model=str(models.target),
            speculative_config=ssd_options(draft, **options),
            **{**harness.ENGINE, **(engine or {})},
        )
    return str(caught.value)


def _drafts() -> list[int]:
    """Draft processes that this process has started and that are still alive."""
    children = psutil.Process(os.getpid()).children(recursive=True)
    return [c.pid for c in children if harness.is_draft(c.pid) and harness.is_alive(c.pid)]


def _assert_no_draft() -> None:
    assert not _drafts()
