"""Progress bars on a terminal, and a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.progress import track as rich_track

T = TypeVar("T")
SECONDS = 30.0


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items, showing how far it is."""
    if sys.stderr.isatty():
        yield from rich_track(items, what)
        return
    began = said = time.monotonic()
    for index, item in enumerate(items):
        yield item
        if (now := time.monotonic()) - said > SECONDS or index + 1 == len(items):
            said = now
            say(f"{what}: {index + 1} of {len(items)}, {now - began:.0f} s")


def say(what: str) -> None:
    """One line on standard error."""
    print(what, file=sys.stderr, flush=True)
