"""What one target has of the draft: its requests, their trees, and what they hold."""

from __future__ import annotations

from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.trees import Trees


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
        self.quiet = False
        """Whether the target has sent nothing for a while: all of its requests count as idle."""

    def idle(self) -> list[Request]:
        """Requests that hold a trunk and were not used in this round."""
        return [
            request
            for request in self.requests.values()
            if request.trunk != DORMANT and (self.quiet or request.last_used < self.round)
        ]

    def held_rows(self) -> int:
        """Rows of all its trunks and forks."""
        return sum(
            1 + len(request.forks) for request in self.requests.values() if request.trunk != DORMANT
        )

    def held_blocks(self) -> int:
        """KV blocks of all its trunks and forks; one that requests share counts for each."""
        return sum(
            len(request.blocks) + sum(map(len, request.forks.values()))
            for request in self.requests.values()
        )
