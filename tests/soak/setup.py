"""What the faults' set-ups share: a server under a load, and what a fault is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.robustness import harness
from tests.robustness.scripts import START_SECONDS
from tests.robustness.serving import Server
from tests.soak.streams import Hits, Streams

SPECULATION: dict[str, Any] = {"method": "ssd", "num_speculative_tokens": 4}
"""All else as by default: whether speculation pays is measured."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """Something that happens to a server under load."""

    cause: Callable[[], str]
    """Lets it happen; returns once the cause is over, with what was seen."""
    prepare: Callable[[], None] = _nothing
    """What it needs, before anything is measured."""


class Setup:
    """A server, its load, and the faults that it may suffer.

    Args:
        server: starting.
    """

    faults: dict[str, Fault]
    hits: Hits
    streams: Streams

    def __init__(self, server: Server) -> None:
        self.server = server

    def begin(self, prompts: Sequence[list[int]], expected: Sequence[list[int]]) -> None:
        """Wait for the server, and start the load."""
        harness.wait_for(self.server.is_healthy, START_SECONDS, "a healthy server")
        self.hits = Hits(self.server)
        self.streams = Streams(self.server, prompts, expected)

    def end_load(self) -> None:
        """Let the last requests end."""
        self.streams.stop()
        self.hits.stop()

    def end(self) -> None:
        """End all processes."""
        self.server.end()
