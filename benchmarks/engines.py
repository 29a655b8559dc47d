"""The engines that the benchmarks compare, and how they take turns."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.load import Case, Load, Measured, put_on
from vllm_ssd.affinity import available_cores
from vllm_ssd.cli.engine_process import run_apart
from vllm_ssd.cli.models import demo_models
from vllm_ssd.config import SSDConfig
from vllm_ssd.target.cores import split_cores


class Engine(NamedTuple):
    """One row of a table."""

    name: str
    speculative_config: dict[str, Any] | None = None
    cores: list[int] | None = None
    """Where its target runs; None: on all there are."""

    @property
    def binds_itself(self) -> bool:
        """SSD's plugin decides where the target runs, by the same rule as :func:`target_cores`."""
        return (self.speculative_config or {}).get("method") == "ssd"


def target_cores(options: dict[str, Any]) -> list[int] | None:
    """The cores that an SSD engine leaves to its target.

    Args:
        options: of the engine.

    Raises:
        ValueError: the draft is to run on a core that there is not.
    """
    return split_cores(options.get("draft_cpu_cores"), in_process=True).target


def draft_model(draft: str, k: int) -> dict[str, Any]:
    """The speculative config of vLLM's own method."""
    return {"method": "draft_model", "model": draft, "num_speculative_tokens": k}


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


def slices(answers: int, size: int) -> int:
    """How many times n answers end until that many are counted, and two of each stream.

    Args:
        answers: to count at least.
        size: n, the streams.
    """
    return max(2, -(-answers // size))


def wide_console() -> Console:
    """The terminal, or a file as wide as the tables need."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def take_turns(
    engines: Sequence[Engine], cases: list[Case], options: argparse.Namespace
) -> dict[str, list[list[Measured]]]:
    """Measure all engines under all loads, ``options.rounds`` times.

    One engine runs at a time; in each round each of them is started once.

    Args:
        engines: what to compare.
        cases: the loads, in the order in which each engine gets them.
        options: of :func:`add_arguments`.

    Returns:
        By the engines' names, for each case, the rounds.

    Raises:
        EngineError: an engine failed.
        RuntimeError: a target ran on other cores than it should.
    """
    target = str(demo_models().target)
    found: dict[str, list[list[Measured]]] = {one.name: [[] for _ in cases] for one in engines}
    turns = [one for _ in range(options.rounds) for one in engines]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=wide_console(), transient=True) as progress:
        bar = progress.add_task("", total=len(turns) * len(cases))
        for number, one in enumerate(turns):
            progress.update(bar, description=one.name)
            load = Load(
                model=target,
                speculative_config=one.speculative_config,
                enforce_eager=not options.compile,
                dtype=options.dtype,
                cores=None if one.binds_itself else one.cores,
                cases=cases,
                max_tokens=options.max_tokens,
                temperature=options.temperature,
                seed=number // len(engines),
                warm_up=options.warm_up,
            )
            began = time.perf_counter()
            report = run_apart(put_on, load, lambda event: progress.advance(bar))
            if report.cores != (one.cores or available_cores()):
                raise RuntimeError(f"{one.name} ran on cores {report.cores}, not on {one.cores}")
            # A line for each, so that the log of a long run shows where it is.
            seconds = time.perf_counter() - began
            where = f"{report.dtype}, cores {','.join(map(str, report.cores))}"
            progress.console.print(f"round {load.seed + 1}: {one.name} ({where}): {seconds:.0f} s")
            for rounds, measured in zip(found[one.name], report.cases, strict=True):
                rounds.append(measured)
    return found
