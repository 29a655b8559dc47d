"""What to run on a machine with a GPU to know whether vllm-ssd works there: ``make test-cuda``.

    python -m tests.cuda.report [--models demo|tiny] [--target FOLDER --draft FOLDER] [--quick]
                                [--only CHECK]

Without a CUDA device it runs all the same on CPU, and the checks that need one are skipped. It
ends with a report in Markdown, to be pasted into an issue (docs/cuda.md); the exit status is 1 if a
check has failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.cuda import device, text, times
from tests.cuda.machine import ROOT, Machine, look_around
from tests.cuda.runs import Effort, Models, Runs
from tests.cuda.verdicts import NotPassedError, Outcome, Verdict, table
from vllm_ssd.cli import CommandError
from vllm_ssd.cli.engine_process import EngineError

OUTPUT = ROOT / "build" / "cuda-report.md"


class Check(NamedTuple):
    """One line of the report."""

    title: str
    run: Callable[[], list[str]]
    """Gives its figures; raises what else it has found."""


def checks(runs: Runs) -> Iterator[Check]:
    """All of them, in their order."""
    yield Check("greedy identity", partial(text.check_identity, runs))
    yield Check("hits and acceptance", partial(text.check_drafts, runs))
    for placement in runs.placements:
        for title, check in (
            ("CUDA graphs", device.check_graphs),
            ("no synchronisation", device.check_syncs),
            ("memory as planned", device.check_memory),
            ("step times", times.check_steps),
            ("speed", times.check_speed),
        ):
            yield Check(f"{title}, {placement.name}", partial(check, runs, placement))
    yield Check("V1 and V2 runner, plain", partial(times.check_runners, runs))
    yield Check("SSD on the V2 runner", partial(times.check_ssd_on_v2, runs, runs.placements[0]))
    yield Check("no synchronisation, on the V2 runner", partial(device.check_syncs_on_v2, runs))


def chosen(every: Iterable[Check], only: list[str] | None) -> list[Check]:
    """Those whose titles have one of these texts; None for all."""
    return [check for check in every if only is None or any(part in check.title for part in only)]


def carry_out(check: Check) -> Verdict:
    """Its verdict. An engine that fails is a check that fails; the others go on."""
    try:
        return Verdict(check.title, Outcome.PASSED, check.run())
    except NotPassedError as error:
        return Verdict(check.title, error.outcome, error.figures, error.reason)
    except EngineError as error:
        return Verdict(check.title, Outcome.FAILED, reason=str(error))


def report(machine: Machine, models: Models, verdicts: list[Verdict], seconds: float) -> str:
    """All that was found, in Markdown."""
    counts = [sum(each.outcome == kind for each in verdicts) for kind in Outcome]
    said = ", ".join(f"{n} {kind}" for n, kind in zip(counts, Outcome, strict=True))
    facts = [f"- {name}: {value}" for name, value in machine.facts.items()]
    names = [Path(model).name for model in (models.target, models.draft)]
    facts.append(f"- models: target {names[0]}, draft {names[1]}")
    title = f"### vllm-ssd, `make test-cuda`: {said}, in {seconds / 60:.0f} min"
    return "\n".join([title, "", *facts, "", table(verdicts), ""])


def pair(options: argparse.Namespace) -> Models:
    """The models to use.

    Raises:
        CommandError: the demonstration's could not be fetched.
    """
    from vllm_ssd.cli.demo import QUESTIONS

    if options.target or options.draft:
        return Models(options.target, options.draft, QUESTIONS)
    if options.models == "tiny":
        from tests.tiny_models import tiny_models

        tiny = tiny_models()
        return Models(str(tiny.target), str(tiny.near), None)
    from vllm_ssd.cli.models import demo_models

    demo = demo_models()
    return Models(str(demo.target), str(demo.draft), QUESTIONS)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests.cuda.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--models",
        choices=("demo", "tiny"),
        default="demo",
        help="demo: SmolLM2-135M-Instruct and its draft; tiny: random ones, made in a second",
    )
    parser.add_argument("--target", help="another target, with a chat format")
    parser.add_argument("--draft", help="and its draft")
    parser.add_argument("--quick", action="store_true", help="no measurement of the speed")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="checks with it in the name"
    )
    parser.add_argument("--minutes", type=float, default=11.0, help="no engine is started later")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file for the report")
    options = parser.parse_args(arguments)
    if bool(options.target) != bool(options.draft):
        parser.error("--target and --draft go together")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, print the report; 1 if one has failed, else 0."""
    options = parse(arguments)
    # Read by vLLM in each engine's process, whose log is shown if it fails.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    began = time.monotonic()
    try:
        models = pair(options)
    except CommandError as error:
        print(f"{error}\nor use --models tiny", file=sys.stderr)
        return 1
    machine = look_around()
    effort = Effort(
        sizes=() if options.quick else (1, 8),
        rounds=1 if options.quick else 3,
        draft_steps=10 if options.quick else 50,
        seconds=60 * options.minutes,
    )

    def tell(line: str) -> None:
        print(f"test-cuda: {line}", file=sys.stderr, flush=True)

    runs = Runs(machine, models, effort, tell)
    verdicts = []
    for check in chosen(checks(runs), options.only):
        verdicts.append(carry_out(check))
        tell(f"{check.title}: {verdicts[-1].outcome}")
    found = report(machine, models, verdicts, time.monotonic() - began)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(found, encoding="utf-8")
    print(found)
    tell(f"the report is in {options.output}")
    return int(any(verdict.outcome is Outcome.FAILED for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
