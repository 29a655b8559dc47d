"""``make test-cuda`` on the tiny models: what needs no GPU runs here, by the same code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda import report
from tests.cuda.machine import look_around
from tests.cuda.report import Check, carry_out
from tests.cuda.text import difference
from tests.cuda.verdicts import FailedError, Outcome, SkippedError, Verdict, table
from vllm_ssd.cli.engine_process import EngineError

ON_CUDA_ALONE = ("CUDA graphs", "no synchronisation", "memory as planned")


def outcomes(text: str) -> dict[str, tuple[str, str]]:
    """Outcome and figures by check, from the report's table."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {
        check.partition(",")[0]: (outcome.strip("*"), said) for check, outcome, said in rows[1:]
    }


def run(folder: Path, *arguments: str) -> dict[str, tuple[str, str]]:
    """What the report says of the tiny models; no check may have failed."""
    file = folder / "report.md"
    status = report.main(["--models", "tiny", "--output", str(file), *arguments])
    text = file.read_text()
    assert status == 0, text
    return outcomes(text)


@pytest.fixture
def no_device() -> None:
    if look_around().has_cuda:
        pytest.skip("there is a CUDA device: run make test-cuda")


@pytest.mark.usefixtures("no_device")
@pytest.mark.slow
def test_what_needs_no_device_is_checked_and_the_rest_skipped(tmp_path: Path) -> None:
    """Three checks of two engines; the rest of what runs here takes more of them."""
    found = run(tmp_path, "--quick", "--only", "identity", "--only", "hits", "--only", "memory")
    assert found["greedy identity"][0] == found["hits and acceptance"][0] == "passed"
    outcome, said = found["memory as planned"]
    assert outcome == "skipped"
    assert said.startswith("no CUDA device; planned"), "with what was found all the same"
    assert len(found) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("no_device")
def test_all_of_it(tmp_path: Path) -> None:
    found = run(tmp_path)
    for check in ON_CUDA_ALONE:
        outcome, said = found[check]
        assert outcome == "skipped"
        assert said.startswith("no CUDA device; ")
    assert found["step times"][0] == "passed"
    outcome, said = found["speed"]
    assert outcome == "passed"
    for engine in ("plain", "draft_model", "SSD"):
        assert f"{engine} (V1, float32)" in said
    assert "identical" in said
    for check in ("V1 and V2 runner", "SSD on the V2 runner"):
        assert found[check][0] == "skipped"


def test_an_engine_that_fails_is_a_check_that_fails() -> None:
    def fails() -> list[str]:
        raise EngineError("SSD, exact: its process ended\nmore of the log")

    verdict = carry_out(Check("greedy identity", fails))
    assert verdict.outcome is Outcome.FAILED
    shown = table([verdict])
    assert "| greedy identity | **failed** | SSD, exact: its process ended |" in shown
    assert "more of the log" in shown.partition("<details>")[2]


@pytest.mark.parametrize("error", [SkippedError("no", ["2 ms"]), FailedError("no", ["2 ms"])])
def test_figures_are_shown_whatever_the_outcome(error: SkippedError | FailedError) -> None:
    def ends() -> list[str]:
        raise error

    verdict = carry_out(Check("step times", ends))
    assert verdict == Verdict("step times", error.outcome, ["2 ms"], "no")
    assert f"| step times | **{error.outcome}** | no; 2 ms |" in table([verdict])


def test_the_first_token_that_differs_is_named() -> None:
    assert difference([[1, 2], [3]], [[1, 2], [3]]) == ""
    assert difference([[1, 2]], [[1, 3]]) == "answer 0 differs from token 1 on: 3 in place of 2"
    assert difference([[1], [2, 3]], [[1], [2]]) == "answer 1 has 1 tokens in place of 2"
