"""Tokens per second of SSD for each K and number of branches, and of settings that adapt.

Every set of prompts at every batch size is a column. The best fixed setting of each is marked;
behind the speed of a setting that adapts stands its difference to that one, with its standard
error. All take turns in one engine at one draft server. The best of many is also the luckiest:
compare the few best again, with more rounds, before believing a small difference.

    python -m benchmarks.settings [--texts mt-bench stories mixture] [--temperature 0.7] \\
        [--sizes 1,16] [--k 2,3,4,6] [--branches 4,8,16] [--fan-outs 2,3] [--fixed JSON] \\
        [--adaptive JSON]
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from benchmarks.engines import (
    add_arguments,
    loads,
    more_ssd_options,
    numbers,
    ssd_engine,
    ssd_name,
    ssd_options,
    take_turns,
    wide_console,
)
from benchmarks.prompts import MIXED, SETS, prompts
from benchmarks.rates import Rate, Ratio
from vllm_ssd.cli.models import demo_models

ADAPTIVE: dict[str, Any] = {"num_speculative_tokens": 6}

Rates = dict[str, dict[str, Rate]]
"""By setting and column."""


def grid(
    ks: list[int], branches: list[int], fan_outs: list[int], fixed: dict[str, Any]
) -> list[dict[str, Any]]:
    """The fixed settings: each K with each number of branches, and with each fan-out.

    Args:
        ks: numbers of speculative tokens.
        branches: of a request.
        fan_outs: guesses after each number of accepted tokens.
        fixed: options of them all.
    """
    counts = [{"branches": one} for one in branches] + [{"fan_out": one} for one in fan_outs]
    return [{"num_speculative_tokens": k, **count, **fixed} for k in ks for count in counts]


def best(fixed: Rates) -> dict[str, str]:
    """The fastest setting of each column."""
    columns = next(iter(fixed.values()))
    return {column: max(fixed, key=lambda name: fixed[name][column].mean) for column in columns}


def table(fixed: Rates, adaptive: Rates, title: str) -> Table:
    """All of it.

    Args:
        fixed: the rates of the fixed settings.
        adaptive: those of the others.
        title: of the table.
    """
    winners = best(fixed)
    shown = Table(title=title, caption="tokens/s ± spread; *: the best fixed one")
    shown.add_column("")
    for column in winners:
        shown.add_column(column, justify="right")
    for name, rates in fixed.items():
        cells = [f"{'*' if winners[column] == name else ''}{one}" for column, one in rates.items()]
        shown.add_row(name, *cells)
    shown.add_section()
    for name, rates in adaptive.items():
        cells = []
        for column, one in rates.items():
            ratio = Ratio.of(one, fixed[winners[column]][column])
            cells.append(f"{one}\n{ratio.difference()}")
        shown.add_row(name, *cells)
    return shown


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    parser.add_argument("--texts", nargs="+", choices=SETS, default=[*MIXED, "mixture"])
    parser.add_argument("--sizes", type=numbers, default="1", help="the batch sizes")
    parser.add_argument("--k", type=numbers, default="2,3,4,6")
    parser.add_argument("--branches", type=numbers, default="4,8,16")
    parser.add_argument("--fan-outs", type=numbers, default="")
    parser.add_argument(
        "--fixed", type=more_ssd_options, default={}, help="options of all fixed settings, JSON"
    )
    parser.add_argument(
        "--adaptive", action="append", type=ssd_options, help="options of a setting that adapts"
    )
    options = parser.parse_args()
    draft = options.draft or str(demo_models().draft)
    fixed = grid(options.k, options.branches, options.fan_outs, options.fixed)
    adaptive = options.adaptive or [ADAPTIVE]
    columns = {
        f"{texts} x {load.size}": load
        for texts in options.texts
        for load in loads(prompts(texts), options)
    }
    with ssd_engine(draft, {ssd_name(one): one for one in fixed + adaptive}, options) as engine:
        measured = take_turns([engine], list(columns.values()), options)
    rates: Rates = {
        name: {
            column: Rate.of([one.slice for one in rounds])
            for column, rounds in zip(columns, of_columns, strict=True)
        }
        for name, of_columns in measured.items()
    }
    title = f"temperature {options.temperature:g}, {options.rounds} rounds"
    of_fixed = {ssd_name(one): rates[ssd_name(one)] for one in fixed}
    of_adaptive = {ssd_name(one): rates[ssd_name(one)] for one in adaptive}
    wide_console().print(table(of_fixed, of_adaptive, title))


if __name__ == "__main__":
    main()
