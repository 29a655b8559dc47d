"""Counters of target and draft, and how they reach the server's process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from vllm_ssd.core.stats import Stats, add_draft_ratios
from vllm_ssd.stats_file import Snapshot, Writer

if TYPE_CHECKING:
    from vllm_ssd.target.client import DraftClient
    from vllm_ssd.wire.messages import Report

SNAPSHOT_SECONDS = 0.25
"""From one writing of the counters to the next at least."""
AFTER_AN_ERROR_SECONDS = 60.0
"""The same after one that failed."""
logger = logging.getLogger("vllm.vllm_ssd")


class DraftCounters:
    """What a draft counts, and what it uses of what it has."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        """Those of this draft, added to those of the drafts before it."""
        self.gauges: dict[str, float] = {}
        """What it uses."""
        self._before: dict[str, float] = {}

    def take(self, message: Report) -> None:
        """It reports."""
        self.counters = {
            name: count + self._before.get(name, 0.0) for name, count in message.counters.items()
        }
        self.gauges = message.gauges

    def ended(self) -> None:
        """This draft has ended: the next one counts from 0."""
        self._before = self.counters


def all_counters(
    stats: Stats, client: DraftClient, decided: Mapping[str, float] = MappingProxyType({})
) -> dict[str, float]:
    """Counters of target and draft, by name.

    Args:
        stats: the target's.
        client: the draft's.
        decided: what is believed of the speculation (:meth:`Decisions.as_dict`).
    """
    return {
        **stats.as_dict(),
        **decided,
        **add_draft_ratios(client.reported.counters),
        **(client.reported.gauges if client.up else {}),
        "draft_up": float(client.up),
    }


class Snapshots:
    """Writes the counters now and then, if a server has asked for them.

    Args:
        stats: the target's counters.
        count: all counters, by name.
    """

    def __init__(self, stats: Stats, count: Callable[[], dict[str, float]]) -> None:
        self._stats = stats
        self._count = count
        self._file = Writer()
        self._next = 0.0
        """When to write next."""

    def step_done(self, last: bool) -> None:
        """Write, if it is time.

        Args:
            last: no step may follow for long: what is written now stays.
        """
        wait = self._next - time.monotonic()  # longer after an error
        if wait <= SNAPSHOT_SECONDS * last:
            self._write()

    def _write(self) -> None:
        self._next = time.monotonic() + SNAPSHOT_SECONDS
        if not self._file.wanted:
            return
        recent, counters = self._stats.recent, self._count()
        counts = {kind: values.count for kind, values in recent.items()}
        values = {kind: values.since(0) for kind, values in recent.items()}
        try:
            self._file.write(Snapshot(counters, counts, values, self._stats.depths))
        except OSError as error:
            self._next += AFTER_AN_ERROR_SECONDS
            logger.warning("ssd: the metrics could not be written: %s", error)

    def close(self) -> None:
        """Remove what was written."""
        self._file.remove()
