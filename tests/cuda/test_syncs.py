"""Whose fault a wait for the device is, by the stack at torch's warning."""

from __future__ import annotations

import warnings
from pathlib import Path
from traceback import FrameSummary

import pytest

import vllm_ssd
from tests.cuda.syncs import WARNING, counted, ours, place_of

OURS = str(Path(vllm_ssd.__file__).parent)
VLLM = "/site-packages/vllm"


def stack(*files: str) -> list[FrameSummary]:
    """Frames of these files, the outermost first."""
    return [FrameSummary(file, 1, Path(file).stem) for file in files]


WORKER = f"{OURS}/target/v1/worker.py"
PROPOSER = f"{OURS}/target/v1/proposer.py"
RUNNER = f"{VLLM}/v1/worker/gpu_model_runner.py"


@pytest.mark.parametrize(
    ("frames", "place"),
    [
        # vLLM's step runs inside our worker's.
        ((WORKER, RUNNER), "vllm/v1/worker/gpu_model_runner.py gpu_model_runner"),
        (
            (WORKER, RUNNER, "/torch/_tensor.py"),
            "vllm/v1/worker/gpu_model_runner.py gpu_model_runner",
        ),
        ((RUNNER, PROPOSER), "vllm_ssd/target/v1/proposer.py proposer"),
        # What both use is on the caller's account.
        (
            (RUNNER, PROPOSER, f"{VLLM}/utils/torch_utils.py"),
            "vllm_ssd/target/v1/proposer.py proposer",
        ),
        (("/torch/a.py", "/torch/b.py"), "b.py b"),
    ],
)
def test_the_innermost_of_us_and_of_vllms_step_is_to_blame(
    frames: tuple[str, ...], place: str
) -> None:
    assert place_of(stack(*frames)) == place


def test_every_warning_is_counted_and_others_are_shown() -> None:
    with warnings.catch_warnings(record=True) as shown, counted() as places:
        for _ in range(3):
            warnings.warn(f"{WARNING} (Triggered internally)", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert places.total() == 3
    assert not ours(places), "of no hook of ours"
    assert [str(each.message) for each in shown] == ["something else"]
