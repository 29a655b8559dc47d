"""What a draft costs that is never right: speculation has to go off.

The demonstration's questions, one at a time, for plain vLLM on the target's cores, SSD with the
demonstration's draft, and SSD with a draft of the same shape whose weights are random. Engines take
turns.

    python benchmarks/hopeless_draft.py [--rounds 2]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file

from vllm_ssd.cli.demo import QUESTIONS
from vllm_ssd.cli.demo_engine import Answers, Questions, ask
from vllm_ssd.cli.models import demo_models

K = 6


def random_copy(draft: Path, folder: Path) -> Path:
    """A model of the same shape that knows nothing."""
    shutil.copytree(draft, folder)
    file = folder / "model.safetensors"
    torch.manual_seed(0)
    weights = {name: _random_like(tensor) for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def _random_like(weight: torch.Tensor) -> torch.Tensor:
    if weight.dtype == torch.int8:
        return torch.randint(-127, 128, weight.shape, dtype=torch.int8)
    if weight.ndim < 2 or weight.shape[1] == 1:  # norms and scales
        return weight
    return torch.randn(weight.shape).mul(0.02).to(weight.dtype)


def main() -> None:
    """Run the engines and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args()
    models = demo_models()
    with tempfile.TemporaryDirectory() as folder:
        drafts: dict[str, str | None] = {
            "plain, on the target's cores": None,
            "SSD": str(models.draft),
            "SSD, random draft": str(random_copy(models.draft, Path(folder, "draft"))),
        }
        runs: dict[str, list[Answers]] = {name: [] for name in drafts}
        for name in track([name for _ in range(options.rounds) for name in drafts], "engines"):
            draft = drafts[name]
            speculative: dict[str, Any] | None = None
            if draft is not None:
                speculative = {"method": "ssd", "model": draft, "num_speculative_tokens": K}
            spec = Questions(
                model=str(models.target),
                speculative_config=speculative,
                enforce_eager=True,
                prompts=QUESTIONS,
                max_tokens=options.max_tokens,
            )
            with _without_the_drafts_core(draft is None):
                runs[name].append(ask(spec, lambda event: None))
    table = Table("", "tokens/s", "to plain", "rounds off", "probes' share", "gain believed")
    plain = _speed(runs["plain, on the target's cores"])
    for name, answers in runs.items():
        metrics = answers[-1].metrics
        proposals = metrics.get("proposals", 0.0)
        table.add_row(
            name,
            f"{_speed(answers):.1f}",
            f"{_speed(answers) / plain:.3f}",
            f"{metrics['rounds_off'] / proposals:.0%}" if proposals else "",
            f"{metrics['probe_seconds'] / answers[-1].seconds:.1%}" if proposals else "",
            f"{metrics['gain_at_1']:+.0%}" if proposals else "",
        )
    Console().print(table)


@contextmanager
def _without_the_drafts_core(wanted: bool) -> Iterator[None]:
    """For an engine without draft: the cores that SSD leaves the target."""
    cores = os.sched_getaffinity(0)
    if wanted and len(cores) > 1:
        os.sched_setaffinity(0, sorted(cores)[:-1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _speed(runs: list[Answers]) -> float:
    tokens = sum(len(answer) for run in runs for answer in run.token_ids)
    return tokens / sum(run.seconds for run in runs)


if __name__ == "__main__":
    main()
