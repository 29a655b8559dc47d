"""A server under a steady load while one thing after the other breaks, and what clients see of it.

    python -m tests.soak.faults [--draft own] [--only "draft killed"]

Streaming clients ask a real ``vllm-ssd serve`` for greedy texts in float32, which plain vLLM has
written first. Each fault has a quiet phase before it and one after hits have come back. Printed at
the end: requests that ended, different texts, requests lost, the pauses between two pieces of a
stream, and the tokens per second of all clients before, during and after. The exit status is 1 if
a text differs, a request is lost, or the plugin had an error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import tests.conftest  # noqa: F401  the environment, before vLLM is imported
from tests.robustness import harness
from tests.soak.setup import Fault, Setup
from tests.soak.streams import Pace

QUIET_SECONDS = 6.0
QUIET = "seconds before a fault, and after hits have come back"
BACK_SECONDS = 240.0
"""Hits come back within this time on a busy machine."""
PROMPTS = harness.prompts(12)
TOKENS = 160
USED = 0.3
"""The hit rate before a fault is at least that: else the draft does nothing that a fault ends."""

console = Console(width=180)


@dataclass(frozen=True)
class Row:
    """What came of one fault."""

    name: str
    requests: int
    different: int
    lost: int
    before: Pace
    during: Pace
    after: Pace
    back_seconds: float
    """From the end of the cause until hits came as often as half of before."""
    seen: str


def main() -> None:
    """Run the faults, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draft", choices=["own", "shared"], action="append")
    parser.add_argument("--only", action="append", help="a fault, by its name in the table")
    parser.add_argument("--quiet", type=float, default=QUIET_SECONDS, help=QUIET)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ssd-") as folder:
        fine = _run(Path(folder), options.draft or ["own", "shared"], options.only, options.quiet)
    sys.exit(0 if fine else 1)


def _run(folder: Path, drafts: list[str], only: list[str] | None, quiet: float) -> bool:
    """Whether nothing was wrong, neither in a fault nor between two."""
    from tests.deep_target import with_deep_target
    from tests.soak.own_draft import OwnDraft
    from tests.soak.shared_draft import SharedDraft
    from tests.tiny_models import tiny_models

    models = with_deep_target(tiny_models(), folder)
    with harness.running_engine(models) as llm:
        expected = harness.Decoding(llm, PROMPTS, TOKENS).finish()
    rows: list[Row] = []
    wrong: list[str] = []
    for kind in drafts:
        its_folder = folder / kind
        its_folder.mkdir()
        setup: Setup = {"own": OwnDraft, "shared": SharedDraft}[kind](models, its_folder)
        try:
            setup.begin(PROMPTS, expected)
            for name, fault in setup.faults.items():
                if only is None or name in only:
                    rows.append(_measure(name, fault, setup, quiet))
                    console.print(f"{time.strftime('%H:%M:%S')} {name}: {rows[-1].seen}")
            setup.end_load()
            wrong += [str(one) for one in setup.streams.ended if one.different or one.lost]
            if errors := setup.hits.newest["errors"]:
                wrong.append(f"{errors:.0f} errors of the plugin")
        finally:
            setup.end()
    console.print(_table(rows))
    for one in wrong:
        console.print(one, style="red")
    return bool(rows) and not wrong


def _measure(name: str, fault: Fault, setup: Setup, quiet: float) -> Row:
    """Let it happen between two quiet phases."""
    fault.prepare()
    hits = setup.hits

    def rate() -> float:
        return hits.rate(time.monotonic() - quiet, time.monotonic())

    harness.wait_for(lambda: rate() > USED, BACK_SECONDS, "a draft that is used")
    began = time.monotonic()
    time.sleep(quiet)
    usual, happened = rate(), time.monotonic()
    seen = fault.cause()
    over = time.monotonic()
    harness.wait_for(
        lambda: hits.back_at(over, usual / 2) is not None, BACK_SECONDS, f"hits after: {name}"
    )
    back = hits.back_at(over, usual / 2)
    assert back is not None
    time.sleep(quiet)
    end = time.monotonic()
    ended = [one for one in setup.streams.ended if began <= one.at < end]
    return Row(
        name,
        requests=len(ended),
        different=sum(one.different for one in ended),
        lost=sum(bool(one.lost) for one in ended),
        before=setup.streams.pace(began, happened),
        during=setup.streams.pace(happened, back),
        after=setup.streams.pace(back, end),
        back_seconds=back - over,
        seen=seen,
    )


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="pauses between two pieces of a stream in ms: median / 99 % / longest")
    table.add_column("fault")
    for column in (
        "requests",
        "different",
        "lost",
        "before",
        "during",
        "after",
        "tokens/s",
        "hits back",
    ):
        table.add_column(column, justify="right")
    table.add_column("seen")
    for row in rows:
        counts = (str(count) for count in (row.requests, row.different, row.lost))
        phases = row.before, row.during, row.after
        rates = " / ".join(f"{phase.tokens_per_second:.0f}" for phase in phases)
        back = f"{row.back_seconds:.1f} s"
        table.add_row(row.name, *counts, *map(str, phases), rates, back, row.seen)
    return table


if __name__ == "__main__":
    main()
