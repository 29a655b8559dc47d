"""The engines that the benchmarks compare, and how they take turns."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.draft_server import draft_server
from benchmarks.load import Case, Load, Measured, Started, Turn, put_on
from vllm_ssd.affinity import available_cores
from vllm_ssd.cli.engine_process import best_dtype, engine_process
from vllm_ssd.cli.models import demo_models
from vllm_ssd.config import SSDConfig
from vllm_ssd.target.cores import split_cores


class Engine(NamedTuple):
    """One row of a table."""

    name: str
    speculative_config: dict[str, Any] | None = None
    cores: list[int] | None = None
    """Where its target runs; None: on all there are."""
    settings: Mapping[str, dict[str, Any]] = MappingProxyType({})
    """Several in place of one: by name, options of SSD that take turns in it."""

    @property
    def binds_itself(self) -> bool:
        """SSD's plugin decides where the target runs, by the same rule as :func:`target_cores`."""
        config = self.speculative_config or {}
        return config.get("method") == "ssd" and "draft_address" not in config


def target_cores(options: dict[str, Any]) -> list[int] | None:
    """The cores that an SSD engine leaves to its target.

    Args:
        options: of the engine.

    Raises:
        ValueError: the draft is to run on a core that there is not.
    """
    return split_cores(options.get("draft_cpu_cores"), in_process=True).target


def draft_model(draft: str, k: int, temperature: float = 0.0) -> dict[str, Any]:
    """The speculative config of vLLM's own method, which samples its drafts above temperature 0."""
    method = "probabilistic" if temperature else "greedy"
    return {
        "method": "draft_model",
        "model": draft,
        "num_speculative_tokens": k,
        "draft_sample_method": method,
    }


def ssd(draft: str, options: dict[str, Any]) -> dict[str, Any]:
    """The speculative config of SSD."""
    return {"method": "ssd", "model": draft, **options}


def ssd_name(options: dict[str, Any]) -> str:
    """An SSD engine's name, of its options: ``"SSD, K = 4, branches 8"``."""
    rest = {name: value for name, value in options.items() if name != "num_speculative_tokens"}
    named = "".join(f", {name} {value}" for name, value in rest.items())
    return f"SSD, K = {options['num_speculative_tokens']}{named}"


def ssd_options(text: str) -> dict[str, Any]:
    """An SSD engine's options from JSON, as the type of a command line's argument.

    Raises:
        argparse.ArgumentTypeError: they are wrong.
    """
    return _checked(text, {})


def more_ssd_options(text: str) -> dict[str, Any]:
    """The same, without ``num_speculative_tokens``."""
    return _checked(text, {"num_speculative_tokens": 1})


def _checked(text: str, others: dict[str, Any]) -> dict[str, Any]:
    try:
        options = json.loads(text)
        SSDConfig.parse({"model": "draft", **others, **options})
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return dict(options)


def numbers(text: str) -> list[int]:
    """``"1,2,4"``, as the type of a command line's argument."""
    return [int(part) for part in text.split(",") if part]


@contextmanager
def ssd_engine(
    draft: str, settings: Mapping[str, dict[str, Any]], options: argparse.Namespace
) -> Iterator[Engine]:
    """One engine for all of SSD's settings; with a draft server beside it, if there are several.

    They then differ in nothing else (``benchmarks/settings_worker.py``).

    Args:
        draft: the draft model.
        settings: by name, the options of each.
        options: of :func:`add_arguments`.
    """
    if len(settings) == 1:
        ((name, its),) = settings.items()
        yield Engine(name, ssd(draft, its), target_cores(its))
        return
    depth = max(its["num_speculative_tokens"] for its in settings.values())
    fastest = "bfloat16" if best_dtype() == "auto" else best_dtype()
    # Of the draft, which has no part in the texts; int8 layers may need 16 bits.
    dtype = fastest if options.dtype in (None, "float32") else options.dtype
    # One more: the engine's own settings are connected as well, though not in use.
    server = draft_server(
        draft, dtype, enforce_eager=not options.compile, targets=len(settings) + 1
    )
    with server as address:
        config = {"method": "ssd", "num_speculative_tokens": depth, **address}
        yield Engine("SSD", config, target_cores({}), settings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all of them are told on the command line."""
    parser.add_argument("--draft", help="default: the demonstration's")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--compile", action="store_true", help="compile the models")
    parser.add_argument("--dtype", help="default: the faster of bfloat16 and float32")
    parser.add_argument("--rounds", type=int, default=3, help="how often the engines take turns")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer")
    parser.add_argument(
        "--answers", type=int, default=24, help="counted, at least; two for each stream in any case"
    )
    parser.add_argument(
        "--warm-up", type=int, default=1, help="answers of each stream that are not counted before"
    )


def loads(texts: list[str], options: argparse.Namespace) -> list[Case]:
    """One load for each of ``options.sizes``, with at least two answers of each stream."""
    return [Case(texts, size, max(options.answers, 2 * size)) for size in options.sizes]


def wide_console() -> Console:
    """The terminal, or a file as wide as the tables need."""
    return Console() if sys.stdout.isatty() else Console(width=160)


@contextmanager
def waiting_for_turns(
    one: Engine, cases: list[Case], options: argparse.Namespace
) -> Iterator[Callable[[Turn], Measured]]:
    """Start an engine, which then measures a load each time it is called.

    Args:
        one: what to start.
        cases: its loads.
        options: of :func:`add_arguments`.

    Raises:
        EngineError: it failed.
        RuntimeError: its target runs on other cores than it should, or its draft is lost.
    """
    theirs, turns = multiprocessing.get_context("spawn").Pipe(duplex=False)
    load = Load(
        model=str(demo_models().target),
        speculative_config=one.speculative_config,
        enforce_eager=not options.compile,
        dtype=options.dtype,
        cores=None if one.binds_itself else one.cores,
        cases=cases,
        turns=theirs,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        warm_up=options.warm_up,
        settings=list(one.settings.values()),
    )
    with engine_process(put_on, load) as work:
        events = iter(work)
        started: Started = next(events)
        if started.cores != (one.cores or available_cores()):
            raise RuntimeError(f"{one.name} runs on cores {started.cores}, not on {one.cores}")

        def measure(turn: Turn) -> Measured:
            turns.send(turn)
            measured: Measured = next(events)
            if down := measured.counters.get("misses_draft_down"):
                raise RuntimeError(f"{one.name} had no draft at {down:.0f} look-ups")
            return measured

        yield measure
        turns.send(None)
        list(events)  # until it has ended


def take_turns(
    engines: Sequence[Engine], cases: list[Case], options: argparse.Namespace
) -> dict[str, list[list[Measured]]]:
    """Measure all engines under all loads, ``options.rounds`` times.

    All of them are up, and one works at a time: those that are compared follow each other within
    seconds, so what changes on the machine from minute to minute affects them all.

    Args:
        engines: what to compare.
        cases: the loads, one after the other.
        options: of :func:`add_arguments`.

    Returns:
        By the names of the engines, or of their settings, for each case, the rounds.

    Raises:
        EngineError: an engine failed.
        RuntimeError: a target runs on other cores than it should, or a draft is lost.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=wide_console(), transient=True))
        bar = progress.add_task("", total=None)
        measure: dict[str, tuple[Callable[[Turn], Measured], int | None]] = {}
        for one in engines:
            progress.update(bar, description=f"starting {one.name}")
            work = stack.enter_context(waiting_for_turns(one, cases, options))
            if not one.settings:
                measure[one.name] = work, None
            measure |= {name: (work, number) for number, name in enumerate(one.settings)}
        found: dict[str, list[list[Measured]]] = {name: [[] for _ in cases] for name in measure}
        progress.update(bar, total=len(measure) * len(cases) * options.rounds)
        turns = [Turn(case, n) for n in range(options.rounds) for case in range(len(cases))]
        for number, turn in enumerate(turns):
            # Forwards and backwards: none always works after the same other one.
            for name in list(measure)[:: -1 if number % 2 else 1]:
                progress.update(bar, description=name)
                work, setting = measure[name]
                found[name][turn.case].append(work(turn._replace(setting=setting)))
                progress.advance(bar)
            # Lines, so that the log of a long run shows where it is.
            rates = ", ".join(f"{of[turn.case][-1].slice.rate:.1f}" for of in found.values())
            where = f"round {turn.round + 1}, load {turn.case + 1} of {len(cases)}"
            progress.console.print(f"{where}: {rates}")
    return found
