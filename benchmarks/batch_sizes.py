"""Tokens per second against the batch size: SSD, plain vLLM and vLLM's ``draft_model``.

Plain vLLM and ``draft_model`` run twice: on the cores that SSD leaves to its target, and on all.
A batch of n is n requests that run all the time (``benchmarks/load.py``). All engines are up and
take turns; each round goes on with the next prompts. Behind a rate ± is half the difference between
the fastest and the slowest round; behind a ratio, which is taken round by round, its standard
error. Several settings of SSD (``--ssd``) take turns in one engine.

The ideal is what SSD would give if every look-up hit at full depth for nothing: at batch n, n times
(acceptance length of ``draft_model`` with the same K) / (SSD's mean verification time). Prefills
are in SSD's rate but not in the ideal; the share of decoding leaves them out, and what is decoded
without speculation.

    python -m benchmarks.batch_sizes [--texts hidden] [--temperature 0.7] [--compile] \\
        [--draw FILE] --ssd '{"num_speculative_tokens": 4}' --ssd JSON
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.engines import (
    Engine,
    add_arguments,
    draft_model,
    loads,
    numbers,
    ssd_engine,
    ssd_name,
    ssd_options,
    take_turns,
    wide_console,
)
from benchmarks.load import Measured, added
from benchmarks.prompts import SETS, prompts
from benchmarks.rates import Rate, Ratio
from vllm_ssd.cli.models import demo_models

SIZES = "1,2,4,8,16,32"
DEFAULT: dict[str, Any] = {"num_speculative_tokens": 4}
OWN, ALL = "target's cores", "all cores"
PLACES = {"own": OWN, "all": ALL}
"""By what they are called on the command line."""
RIVALS = ("plain", "draft_model")


class Point(NamedTuple):
    """One engine at one batch size."""

    rate: Rate
    counters: dict[str, float]


Curves = dict[str, dict[int, Point]]
"""By engine and batch size."""


def rivals_of(one: Engine, ks: list[int], options: argparse.Namespace, draft: str) -> list[Engine]:
    """The engines that SSD's is compared with.

    Args:
        one: SSD's.
        ks: numbers of speculative tokens of ``draft_model``.
        options: which of ``RIVALS`` in which of ``PLACES``, and the temperature.
        draft: the draft model.
    """
    found = []
    for place in options.places:
        place, cores = PLACES[place], one.cores if place == "own" else None
        if "plain" in options.rivals:
            found.append(Engine(f"plain, {place}", None, cores))
        if "draft_model" in options.rivals:
            for k in ks:
                config = draft_model(draft, k, options.temperature)
                found.append(Engine(f"draft_model, K = {k}, {place}", config, cores))
    return found


def curves(measured: dict[str, list[list[Measured]]], sizes: list[int]) -> Curves:
    """The rates from what was measured, by engine and then by batch size, in its order."""
    return {
        name: {
            size: Point(Rate.of([one.slice for one in rounds]), added(rounds))
            for size, rounds in zip(sizes, of_sizes, strict=True)
        }
        for name, of_sizes in measured.items()
    }


def acceptance_length(counters: dict[str, float]) -> float | None:
    """Tokens of a verification of drafted tokens; None where there was none."""
    if not counters.get("drafts"):
        return None
    return 1 + counters["accepted_tokens"] / counters["drafts"]


def mean(counters: dict[str, float], total: str, count: str) -> float | None:
    """A counter by how often it was added to; None where it never was."""
    return counters[total] / counters[count] if counters.get(count) else None


def ideal(point: Point, rival: Point | None, size: int) -> float | None:
    """Tokens per second, if every look-up hit at full depth for nothing.

    Args:
        point: SSD's.
        rival: of ``draft_model`` with the same K.
        size: the batch size.
    """
    length = acceptance_length(rival.counters) if rival else None
    seconds = mean(point.counters, "verify_seconds", "verify_intervals")
    return None if length is None or seconds is None else size * length / seconds


def decoding_rate(counters: dict[str, float]) -> float:
    """SSD's tokens per second of the rounds that speculate: without what only prefills."""
    verified = counters["look_ups"] - counters["first_look_ups"]
    seconds = counters["verify_seconds"] + counters["propose_seconds"]
    return (verified + counters["tokens_accepted"]) / seconds


def speeds(found: Curves, title: str) -> Table:
    """Tokens per second, and their ratio to plain vLLM on the target's cores and on all."""
    table = Table(title=title, caption=f"tokens/s ± spread; × plain on the {OWN} | × on {ALL}")
    table.add_column("")
    for size in next(iter(found.values())):
        table.add_column(f"batch {size}", justify="right")
    bases = [found.get(f"plain, {place}") for place in (OWN, ALL)]
    for name, points in found.items():
        cells = []
        for size, point in points.items():
            ratios = [_ratio(point, base[size] if base else None) for base in bases]
            cells.append(f"{point.rate}\n{' | '.join(ratios)}")
        table.add_row(name, *cells)
    return table


def _ratio(point: Point, base: Point | None) -> str:
    return str(Ratio.of(point.rate, base.rate)) if base else "-"


def details(found: Curves, ks: dict[str, int]) -> Table:
    """What lies behind SSD's speeds.

    Args:
        found: the curves of all engines.
        ks: K of the SSD engines, by name.
    """
    table = Table(title="SSD")
    table.add_column("")
    columns = ("batch", "hit rate", "acceptance\nlength", "that of\ndraft_model", "verification")
    for column in (*columns, "share of\nthe ideal", "that of\ndecoding"):
        table.add_column(column, justify="right")
    for name, k in ks.items():
        rivals = (found.get(f"draft_model, K = {k}, {place}") for place in (OWN, ALL))
        rival = next((one for one in rivals if one), None)
        for size, point in found[name].items():
            other = rival[size] if rival else None
            seconds = mean(point.counters, "verify_seconds", "verify_intervals")
            best = ideal(point, other, size)
            table.add_row(
                name,
                str(size),
                _shown(mean(point.counters, "hits", "look_ups"), ".3f"),
                _shown(acceptance_length(point.counters), ".2f"),
                _shown(acceptance_length(other.counters) if other else None, ".2f"),
                _shown(1e3 * seconds if seconds else None, ".1f", " ms"),
                _shown(point.rate.mean / best if best else None, ".2f"),
                _shown(decoding_rate(point.counters) / best if best else None, ".2f"),
            )
        table.add_section()
    return table


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def draw(found: Curves, title: str, file: Path) -> None:
    """Both as a figure: tokens per second, and the ratio to plain on the target's cores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = found.get(f"plain, {OWN}")
    figure, panels = pyplot.subplots(1, 2 if base else 1, figsize=(11 if base else 6, 4.5))
    speed, *ratio = [panels] if base is None else panels
    colours = {"plain": "black", "draft_model": "tab:gray"}
    for name, points in found.items():
        style: dict[str, Any] = {"label": name, "marker": "o", "markersize": 3}
        style["linestyle"] = "--" if name.endswith(ALL) else "-"
        colour = colours.get(name.split(",")[0])
        style |= {"color": colour} if colour else {"linewidth": 2}
        sizes = list(points)
        speed.plot(sizes, [point.rate.mean for point in points.values()], **style)
        if base:
            ratios = [point.rate.mean / base[size].rate.mean for size, point in points.items()]
            ratio[0].plot(sizes, ratios, **style)
    speed.set_yscale("log")
    speed.set_ylabel("tokens/s")
    speed.legend(fontsize=8)
    if base:
        ratio[0].set_ylabel(f"× plain vLLM on the {OWN}")
    for axes in (speed, *ratio):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("batch size")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measure, print both tables, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    parser.add_argument("--ssd", action="append", type=ssd_options, help="SSD's options, JSON")
    parser.add_argument("--sizes", type=numbers, default=SIZES)
    parser.add_argument("--texts", choices=SETS, default="hidden")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS)
    parser.add_argument(
        "--places", nargs="+", choices=PLACES, default=list(PLACES), help="cores of the rivals"
    )
    parser.add_argument("--draw", type=Path, help="where to draw the curves (.png, .svg)")
    options = parser.parse_args()
    draft = options.draft or str(demo_models().draft)
    settings = {ssd_name(one): one for one in options.ssd or [DEFAULT]}
    ks = {name: one["num_speculative_tokens"] for name, one in settings.items()}
    cases = loads(prompts(options.texts), options)
    with ssd_engine(draft, settings, options) as ssd:
        engines = [*rivals_of(ssd, sorted(set(ks.values())), options, draft), ssd]
        found = curves(take_turns(engines, cases, options), options.sizes)
    title = f"{options.texts}, temperature {options.temperature:g}"
    console = wide_console()
    console.print(speeds(found, f"{title}, {options.rounds} rounds"))
    console.print(details(found, ks))
    if options.draw:
        draw(found, title, options.draw)


if __name__ == "__main__":
    main()
