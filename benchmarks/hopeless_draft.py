"""What a draft costs that is never right: speculation has to go off.

Plain vLLM on the target's cores, SSD with the demonstration's draft, and SSD with a draft of the
same shape whose weights are random, one request at a time (``--sizes`` for more). The first round
shows what it costs to find out, the others what it costs once that is known.

    python -m benchmarks.hopeless_draft --warm-up 0 [--rounds 6] [--sizes 1,8]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks.engines import (
    Engine,
    add_arguments,
    loads,
    numbers,
    ssd,
    take_turns,
    target_cores,
    wide_console,
)
from benchmarks.load import Measured
from benchmarks.prompts import prompts
from benchmarks.rates import Rate, Ratio
from vllm_ssd.cli.models import demo_models

PLAIN, RIGHT, RANDOM = "plain, on the target's cores", "SSD", "SSD, random draft"


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


def table(found: dict[str, list[list[Measured]]], sizes: list[int], k: int) -> Table:
    """The speeds, and what speculation did."""
    title = f"K = {k}; to plain in the first round, and in the others"
    shown = Table("batch", "", "tokens/s", "first", "others", "rounds off", title=title)
    for number, size in enumerate(sizes):
        rounds = {name: [one.slice for one in of[number]] for name, of in found.items()}
        for name, of_cases in found.items():
            ratios = [
                str(Ratio.of(Rate.of(rounds[name][part]), Rate.of(rounds[PLAIN][part])))
                if rounds[name][part]
                else "-"
                for part in (slice(1), slice(1, None))
            ]
            counters = of_cases[number][-1].counters
            proposals = counters.get("proposals")
            off = f"{counters['rounds_off'] / proposals:.0%}" if proposals else ""
            shown.add_row(str(size), name, str(Rate.of(rounds[name])), *ratios, off)
    return shown


def main() -> None:
    """Run the engines and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    parser.add_argument("--sizes", type=numbers, default="1")
    parser.add_argument("--k", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        right = options.draft or str(demo_models().draft)
        its = {"num_speculative_tokens": options.k}
        drafts = {RIGHT: right, RANDOM: str(random_copy(Path(right), Path(folder, "draft")))}
        cores = target_cores(its)
        engines = [
            Engine(PLAIN, None, cores),
            *(Engine(name, ssd(draft, its), cores) for name, draft in drafts.items()),
        ]
        texts = prompts("hidden")
        cases = loads(texts, options)
        found = take_turns(engines, cases, options)
    wide_console().print(table(found, options.sizes, options.k))


if __name__ == "__main__":
    main()
