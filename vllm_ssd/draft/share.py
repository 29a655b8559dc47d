"""What one target has of the draft: its requests, their trees, and what they hold."""

from __future__ import annotations

import math
import time

from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.trees import Trees

QUIET_SECONDS = 5.0
"""A target that has sent nothing for so long counts as idle; during a step it sends nothing."""


class Share:
    """The requests of one target.

    Args:
        index: which of the draft's targets; the rows that it holds are marked with it.
        trees: the trees of its requests.
        counters: counters to keep.
    """

    def __init__(self, index: int, trees: Trees, counters: dict[str, float]) -> None:
        self.index = index
        self.trees = trees
        self.counters = counters
        self.requests: dict[int, Request] = {}
        """By handle."""
        self.awaited: dict[int, Request] = {}
        """Those whose trunk the target waits for: it decides later what it proposes."""
        self.round = 0
        """Rounds so far: the clock of :attr:`Request.last_used`."""
        self.last_heard = math.inf
        """When the target last sent something, by ``time.monotonic``."""

    @property
    def quiet(self) -> bool:
        """Whether the target has sent nothing for a while: all of its requests count as idle."""
        return time.monotonic() - self.last_heard > QUIET_SECONDS

    def idle(self) -> list[Request]:
        """Requests that hold a trunk and were not used in this round."""
        quiet = self.quiet
        return [
            request
            for request in self.requests.values()
            if request.trunk != DORMANT and (quiet or request.last_used < self.round)
        ]

    def held_rows(self) -> int:
        """Rows of all its trunks and forks."""
        return sum(
            1 + len(request.forks) for request in self.requests.values() if request.trunk != DORMANT
        )

    def held_blocks(self) -> int:
        """KV blocks of all its trunks and forks; one that requests share counts once."""
        trunks = {block.block_id for request in self.requests.values() for block in request.blocks}
        forks = sum(
            len(own) for request in self.requests.values() for own in request.forks.values()
        )
        return len(trunks) + forks
