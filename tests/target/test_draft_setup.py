"""The draft process's set-up: where its model comes from, how long its texts are, how large its
cache is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.test_errors import configure
from tests.tiny_models import MAX_POSITIONS, TinyModels
from vllm_ssd.preflight import check_engine
from vllm_ssd.target.draft_setup import DraftPlan, plan_draft
from vllm_ssd.target.links.process import draft_environment
from vllm_ssd.wire.messages import Setup

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _sizes_are_the_tests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def plan(models: TinyModels, engine: dict[str, Any] | None = None, **options: Any) -> DraftPlan:
    config = configure(models, engine, **options)
    return plan_draft(check_engine(config), config)


def arguments(plan: DraftPlan) -> dict[str, Any]:
    """The engine arguments as they arrive in the draft process."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(plan.setup), type=Setup).engine_args


# ---- where the model comes from


def test_what_finds_a_draft_on_the_hub_reaches_the_draft_process(tiny_pair: TinyModels) -> None:
    found = arguments(
        plan(
            tiny_pair,
            {"download_dir": "/models", "load_format": "dummy", "hf_token": "secret"},
            draft_revision="v2",
            draft_code_revision="v3",
            draft_hf_overrides={"max_position_embeddings": 128, "nested": {"a": [1]}},
        )
    )
    assert found["revision"] == "v2"
    assert found["code_revision"] == "v3"
    assert found["hf_overrides"] == {"max_position_embeddings": 128, "nested": {"a": [1]}}
    assert found["download_dir"] == "/models"
    assert found["hf_token"] == "secret"
    assert found["trust_remote_code"] is False


def test_the_load_format_is_the_drafts_own(tiny_pair: TinyModels) -> None:
    assert arguments(plan(tiny_pair, {"load_format": "dummy"}))["load_format"] == "auto"
    found = plan(tiny_pair, draft_load_format="safetensors")
    assert arguments(found)["load_format"] == "safetensors"


def test_the_draft_process_configures_the_model_that_was_checked(tiny_pair: TinyModels) -> None:
    found = plan(tiny_pair, draft_hf_overrides={"max_position_embeddings": 128})
    assert found.max_model_len == 128
    theirs = EngineArgs(**arguments(found)).create_engine_config().model_config
    assert theirs.max_model_len == 128
    assert theirs.hf_config.max_position_embeddings == 128
    assert theirs.model == str(tiny_pair.draft)


def test_a_relative_folder_is_found_from_anywhere(
    tiny_pair: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_pair.draft.parent)
    (tmp_path / "tokens.txt").write_text("5\n")
    tokens = os.path.relpath(tmp_path / "tokens.txt")
    config = configure(tiny_pair, model="./draft", draft_vocab=tokens)
    monkeypatch.chdir("/")
    found = plan_draft(check_engine(config), config)
    assert arguments(found)["model"] == str(tiny_pair.draft)
    assert found.setup.draft_vocab


# ---- how long its texts are


def test_the_draft_follows_texts_as_long_as_the_target_and_it_can(tiny_pair: TinyModels) -> None:
    assert plan(tiny_pair, {"max_model_len": 100}).max_model_len == 100
    assert plan(tiny_pair, draft_max_model_len=64).max_model_len == 64


def test_with_an_automatic_length_the_drafts_fits_its_share(tiny_pair: TinyModels) -> None:
    # What "--max-model-len auto" is on the command line.
    engine = {"max_model_len": -1, "max_num_seqs": 1, "kv_cache_memory_bytes": MIB}
    found = plan(tiny_pair, engine, branches=1)
    assert found.max_model_len == MAX_POSITIONS
    # Its length is part of the set-up, so the start has to wait.
    assert not found.may_start_early
    found.share_memory(100 * 4096, target_kv_bytes_per_token=4096.0)
    # A hundred tokens like the target and two blocks of the fork: five blocks, one of them vLLM's.
    assert found.max_model_len == arguments(found)["max_model_len"] == 128
    assert found.kv_cache_memory_bytes == (100 + 2 * 32) * found.kv_bytes_per_token


def test_with_an_automatic_length_the_drafts_fits_the_size_it_is_given(
    tiny_pair: TinyModels,
) -> None:
    engine = {"max_model_len": -1}
    found = plan(tiny_pair, engine, model=str(tiny_pair.target), draft_kv_cache_memory_bytes=MIB)
    assert found.max_model_len == arguments(found)["max_model_len"] == MIB // 2048 - 32
    assert found.max_model_len < MAX_POSITIONS


def test_a_length_the_user_gives_is_not_lowered(tiny_pair: TinyModels) -> None:
    found = plan(tiny_pair, {"max_model_len": -1}, draft_max_model_len=512)
    assert not found.fits_length
    assert found.max_model_len == 512


# ---- its share of the memory


def test_the_draft_leaves_the_target_the_rest(tiny_pair: TinyModels) -> None:
    found = plan(tiny_pair, {"max_num_seqs": 2})
    available = 4096 * MIB
    found.share_memory(available, target_kv_bytes_per_token=65536.0)
    assert found.taken_from_target == found.kv_cache_memory_bytes + found.overhead_bytes
    # No more than its two requests can use, and two blocks for each row.
    tokens = 2 * 256 + 2 * found.rows * 32
    assert found.kv_cache_memory_bytes == tokens * found.kv_bytes_per_token


def test_a_target_of_given_size_keeps_it(tiny_pair: TinyModels) -> None:
    found = plan(tiny_pair, {"kv_cache_memory_bytes": 64 * MIB})
    found.share_memory(64 * MIB, target_kv_bytes_per_token=65536.0)
    assert found.taken_from_target == 0
    assert found.kv_cache_memory_bytes > 0


def test_a_draft_that_would_leave_nothing_is_refused(tiny_pair: TinyModels) -> None:
    found = plan(tiny_pair, draft_kv_cache_memory_bytes=600 * MIB)
    with pytest.raises(ValueError, match=r"^ssd: the draft needs \d+ MiB of the 1000 MiB left"):
        found.share_memory(1000 * MIB, target_kv_bytes_per_token=4096.0)


# ---- its process


def test_the_draft_process_sees_one_device_and_nothing_of_the_targets_own() -> None:
    target = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "0,GPU-b",
        "OMP_NUM_THREADS": "9",
        "GOMP_CPU_AFFINITY": "0",
        "LOCAL_RANK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    environment = draft_environment(target, threads=0, device="GPU-b")
    assert environment.pop("CUDA_VISIBLE_DEVICES") == "GPU-b"
    assert environment.pop("PATH") == "/bin"
    assert set(environment) == {"VLLM_USE_V2_MODEL_RUNNER", "VLLM_ENABLE_V1_MULTIPROCESSING"}
    on_cpu = draft_environment(target, threads=3, device=None)
    assert on_cpu["OMP_NUM_THREADS"] == "3"
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == "0,GPU-b"
