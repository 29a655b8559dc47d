"""Counts what look-ups found and what verification made of it."""

from __future__ import annotations

from vllm_ssd.core.stats import Stats
from vllm_ssd.core.tree import Where
from vllm_ssd.target.lookup import count_backup
from vllm_ssd.target.requests import Origin, Tracked
from vllm_ssd.target.v2.outcomes import Row


class Tally:
    """By the requests' serials: requests that the draft does not know propose tokens too.

    Args:
        stats: the counters.
    """

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._proposed: dict[int, Origin] = {}
        """Where the last proposals are from."""

    def verified(self, row: Row) -> None:
        """Count what was accepted of the last proposal; the tokens that filled it up do not."""
        origin = self._proposed.pop(row.serial, None)
        if origin is None:
            return
        drafted = min(sum(origin), row.verified)
        if not drafted:
            return
        stats, right = self._stats, min(len(row.sampled) - 1, drafted)
        stats.verifications += 1
        stats.rejections += right < drafted
        stats.tokens_drafted += drafted
        stats.tokens_accepted += right
        count_backup(origin, drafted, right, stats)

    def proposed(self, row: Row) -> None:
        """Count a proposal, and keep where it is from."""
        self._stats.tokens_filled += row.filled
        self._stats.ngram_proposals += bool(row.ngram)
        self._stats.tokens_with_probabilities += row.sampled_drafts
        if row.proposed or row.ngram:
            self._proposed[row.serial] = Origin(len(row.proposed), 0, len(row.ngram))

    def forget(self, serial: int) -> None:
        """A request has left its slot."""
        self._proposed.pop(serial, None)

    def looked_up(self, row: Row, request: Tracked) -> None:
        """Count a look-up that could use a draft."""
        stats = self._stats
        hit = row.where is Where.FOUND and (bool(row.proposed) or row.ended)
        stats.look_ups += 1
        if request.look_ups == 1 and not request.resynced:
            stats.first_look_ups += 1
            stats.first_hits += hit
        if hit:
            stats.hit(len(row.proposed))
        elif row.where is Where.OFF:
            stats.misses_no_branch += 1
        elif request.look_ups == 1 and request.resynced:
            stats.misses_resync += 1
        else:
            stats.misses_not_ready += 1
