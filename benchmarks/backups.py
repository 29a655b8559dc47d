"""Tokens per second of the backups against the batch size, and where they should cross.

A backup is what is proposed where a look-up finds nothing, or too little (option ``backup``). The
paper (arXiv 2603.03251, Section 4.3) compares two: a slow one that drafts while the whole batch
waits, and a fast one that proposes nothing. With hit rate p, b requests and a verification of V(b):

    fast(b) = b (p E_hit + 1 - p) / V(b)
    slow(b) = b (p E_hit + (1 - p) E_miss) / (V(b) + (1 - p^b) W)

E_hit and E_miss are the tokens of a round after a hit and after a wait, W is the time of a wait.
The slow one is faster up to the critical batch size b*. Both curves are printed from what was
measured; ``auto`` decides by the same times at every miss, and waits only while that pays. All of
them take turns in one engine.

    python -m benchmarks.backups [--sizes 1,2,4,8,16] [--texts hidden] [--temperature 0.7]
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.batch_sizes import Curves, curves, mean
from benchmarks.engines import (
    add_arguments,
    loads,
    more_ssd_options,
    numbers,
    ssd_engine,
    take_turns,
    wide_console,
)
from benchmarks.prompts import SETS, prompts
from vllm_ssd.cli.models import demo_models

BACKUPS = ("none", "ngram", "draft", "auto")
DEPTH = 4


class Model(NamedTuple):
    """The paper's model of a round, with measured times."""

    hit: float
    """p."""
    after_hit: float
    """E_hit."""
    after_wait: float
    """E_miss."""
    wait: float
    """W, seconds."""

    def fast(self, size: int, verification: float) -> float:
        """Tokens per second with nothing proposed after a miss.

        Args:
            size: b.
            verification: V(b), seconds.
        """
        return size * (self.hit * self.after_hit + 1.0 - self.hit) / verification

    def slow(self, size: int, verification: float) -> float:
        """Tokens per second where the batch waits for the draft after every miss."""
        tokens = self.hit * self.after_hit + (1.0 - self.hit) * self.after_wait
        return size * tokens / (verification + (1.0 - self.hit**size) * self.wait)


def model_of(none: dict[str, float], draft: dict[str, float]) -> Model | None:
    """The model at one batch size; None if something it needs was not seen.

    Args:
        none: counters of the engine that proposes nothing after a miss.
        draft: of the one that always waits.
    """
    misses = draft["look_ups"] - draft["hits"]
    wait = mean(draft, "wait_seconds", "waits")
    if not none["hits"] or not misses or wait is None:
        return None
    # Shallow hits are waited for as well: what these waits bring is shared out by the tokens.
    return Model(
        none["hits"] / none["look_ups"],
        1.0 + none["tokens_accepted"] / none["hits"],
        1.0 + draft["waited_accepted"] / misses,
        wait,
    )


def critical_size(found: Curves) -> int | None:
    """The largest measured batch up to which waiting is faster by the model."""
    best = None
    for size, point in found["draft"].items():
        modelled = _modelled(found, size, point.counters)
        if modelled is None or modelled[0] > modelled[1]:
            break
        best = size
    return best


def _modelled(
    found: Curves, size: int, draft: dict[str, float]
) -> tuple[float, float, Model] | None:
    none = found["none"][size].counters
    model, verification = model_of(none, draft), mean(none, "verify_seconds", "verify_intervals")
    if model is None or verification is None:
        return None
    return model.fast(size, verification), model.slow(size, verification), model


def table(found: Curves, title: str) -> Table:
    """Measured and modelled tokens per second, and what was waited for."""
    shown = Table(title=title, caption="fast, slow: the paper's two backups by its model")
    for column in ("batch", *BACKUPS, "fast", "slow", "p", "W", "auto waited", "of text, auto"):
        shown.add_column(column, justify="right")
    for size, auto in found["auto"].items():
        modelled = _modelled(found, size, found["draft"][size].counters)
        counters = auto.counters
        waited = mean(counters, "waits", "proposals")
        accepted = mean(counters, "waited_accepted", "waits")
        text = mean(counters, "ngram_accepted", "ngram_tokens")
        shown.add_row(
            str(size),
            *(str(found[backup][size].rate) for backup in BACKUPS),
            *(("-",) * 4 if modelled is None else _cells(*modelled)),
            "-" if not waited else f"{waited:.0%}, {accepted or 0.0:.2f} tokens",
            "-" if text is None else f"{text:.0%} of {counters['ngram_tokens']:.0f}",
        )
    return shown


def _cells(fast: float, slow: float, model: Model) -> tuple[str, str, str, str]:
    return f"{fast:.1f}", f"{slow:.1f}", f"{model.hit:.2f}", f"{1e3 * model.wait:.1f} ms"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    parser.add_argument("--sizes", type=numbers, default="1,2,4,8,16,32")
    parser.add_argument("--texts", choices=SETS, default="hidden")
    parser.add_argument(
        "--ssd", type=more_ssd_options, default={}, help="further options of all, JSON"
    )
    options = parser.parse_args()
    draft = options.draft or str(demo_models().draft)

    own = {"num_speculative_tokens": DEPTH, **options.ssd}
    settings: dict[str, dict[str, Any]] = {one: {**own, "backup": one} for one in BACKUPS}
    settings["draft"]["max_wait_ms"] = 1000.0  # always, as the paper's slow backup
    cases = loads(prompts(options.texts), options)
    with ssd_engine(draft, settings, options) as engine:
        found = curves(take_turns([engine], cases, options), options.sizes)
    console = wide_console()
    console.print(table(found, f"{options.texts}, temperature {options.temperature:g}"))
    console.print(f"b*, the largest measured batch where slow is ahead: {critical_size(found)}")


if __name__ == "__main__":
    main()
