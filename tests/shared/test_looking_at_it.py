"""What an operator sees of a draft server: its metrics, and ``vllm-ssd doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.robustness import harness
from tests.robustness.harness import Decoding
from tests.shared.conftest import MAX_TOKENS, TEXTS
from tests.shared.servers import Server, attached, free_port
from tests.tiny_models import TinyModels, random_llama
from vllm_ssd.cli.doctor_server import examine_server
from vllm_ssd.cli.findings import Finding, Status
from vllm_ssd.cli.server_metrics import COUNTERS, GAUGES


@pytest.fixture(scope="module")
def engine(server: Server, tiny_pair: TinyModels) -> Iterator[LLM]:
    with harness.running_engine(tiny_pair, attached(server.address, server.key_file)) as llm:
        yield llm


def test_metrics_show_targets_steps_and_what_is_in_use(
    server: Server, engine: LLM, expected: list[list[int]]
) -> None:
    before = server.metrics()
    assert set(before) == {
        *(f"vllm:ssd_server_{name}" for name in GAUGES),
        *(f"vllm:ssd_server_{name}_total" for name in COUNTERS),
    }
    assert before["vllm:ssd_server_targets"] == 1
    decoding = Decoding(engine, TEXTS, MAX_TOKENS)
    for _ in range(8):
        decoding.step()
    during = server.metrics()
    assert during["vllm:ssd_server_draft_rows_used"] > 0
    assert 0.0 < during["vllm:ssd_server_draft_kv_cache_usage_perc"] < 1.0
    assert decoding.finish() == expected
    after = server.metrics()
    for name in ("draft_steps", "draft_step_seconds", "draft_step_rows"):
        assert after[f"vllm:ssd_server_{name}_total"] > before[f"vllm:ssd_server_{name}_total"]


def test_the_engine_knows_what_its_draft_uses(engine: LLM, expected: list[list[int]]) -> None:
    assert Decoding(engine, TEXTS, MAX_TOKENS).finish() == expected
    found = harness.stats(engine)
    assert found["draft_rows_used"] >= 0.0
    assert 0.0 <= found["draft_kv_cache_usage_perc"] < 1.0


def test_doctor_reaches_it(server: Server, tiny_pair: TinyModels) -> None:
    joined = server.metrics()["vllm:ssd_server_targets_joined_total"]
    assert found(server, None).status == Status.OK
    drafts = found(server, tiny_pair.target)
    assert (drafts.status, "it drafts for" in drafts.found) == (Status.OK, True)
    assert server.metrics()["vllm:ssd_server_targets_joined_total"] == joined


def test_doctor_says_why_not(server: Server, tmp_path: Path, tiny_pair: TinyModels) -> None:
    nowhere = examine_server(f"tcp://127.0.0.1:{free_port()}", str(server.key_file), None)
    assert "nothing listens there" in next(nowhere).found
    keyless = next(examine_server(server.address, None, None))
    assert (keyless.status, "TCP needs a key" in keyless.found) == (Status.ERROR, True)
    other = tmp_path / "other"
    random_llama(layers=1, seed=3).save_pretrained(other)
    for file in tiny_pair.target.glob("tokenizer*"):
        (other / file.name).write_text(file.read_text().replace('"w17"', '"another"'))
    refused = found(server, other)
    assert (refused.status, "tokenizer" in refused.found) == (Status.ERROR, True)


def found(server: Server, target: Path | None) -> Finding:
    """The only finding."""
    key_file = str(server.key_file)
    (finding,) = examine_server(server.address, key_file, str(target) if target else None)
    return finding
