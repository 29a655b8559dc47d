"""What goes when rows or KV blocks run short.

The least likely forks go first. Then requests that their target has not used lately are evicted;
they are prefilled again when they come back. What targets may take from each other is decided in
:mod:`vllm_ssd.draft.fairness`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vllm_ssd.draft.blocks import KVBlocks
from vllm_ssd.draft.fairness import Fairness, Part
from vllm_ssd.draft.request import Request
from vllm_ssd.draft.rows import Rows
from vllm_ssd.draft.share import Share


class Shortage:
    """Frees rows and blocks.

    Args:
        rows: the rows of the batch.
        blocks: the blocks of the KV cache.
        shares: of all targets; the list is the caller's and changes.
        release: frees all that a request holds.
        prune: frees some forks of a request, given their rows.
    """

    def __init__(
        self,
        rows: Rows,
        blocks: KVBlocks,
        shares: list[Share],
        release: Callable[[Request], None],
        prune: Callable[[Request, list[int]], None],
    ) -> None:
        self._rows = rows
        self._blocks = blocks
        self._fairness = Fairness(shares, Part(len(rows.start), blocks.count))
        self._release = release
        self._prune = prune

    def make_room(self, wanting: Request, rows: int = 0, blocks: int = 0) -> bool:
        """Free so many rows and blocks; False if that cannot be done.

        The least likely forks go first, then the least recently used requests are evicted. Requests
        used in this round keep their trunk: if they evicted each other in turn, none would get a
        draft. Nothing is evicted if that would not free enough blocks.
        """
        if self._has_room(rows, blocks):
            return True
        lenders = self._fairness.lenders(wanting.share, Part(rows, blocks))
        idle = [one for share in lenders for one in share.idle() if one is not wanting]
        if blocks > self._within_reach(lenders, idle):
            return False
        self._take_forks(lenders, rows, blocks)
        idle.sort(
            key=lambda request: (not request.share.quiet, request.last_used - request.share.round)
        )
        for request in idle:
            missing = self._missing(rows, blocks)
            if max(missing) <= 0:
                return True
            if lenders[request.share].helps(missing):
                lenders[request.share] -= Part(1, len(request.blocks))
                request.share.counters["draft_evictions"] += 1
                self._release(request)
        return self._has_room(rows, blocks)

    def claim(self, share: Share, rows: int, blocks: int) -> None:
        """Take forks that other targets hold beyond their fair share, up to one's own."""
        if self._has_room(rows, blocks):
            return
        left = self._fairness.left(share)
        rows, blocks = int(min(rows, left.rows)), int(min(blocks, left.blocks))
        lenders = self._fairness.lenders(share, Part(rows, blocks))
        del lenders[share]
        self._take_forks(lenders, rows, blocks)

    def _take_forks(self, lenders: dict[Share, Part], rows: int, blocks: int) -> None:
        """Free forks, the least likely first, until there are so many free rows and blocks.

        Args:
            lenders: whose, and at most how much of each; what is taken is taken off.
            rows: to be free.
            blocks: to be free.
        """
        missing = self._missing(rows, blocks)
        taken: dict[Request, list[int]] = {}
        forks = [
            (request, row)
            for share in lenders
            for request in share.requests.values()
            for row in request.forks
        ]
        chances = self._rows.chance[[row for _, row in forks]]
        for i in np.argsort(chances, kind="stable").tolist():
            if max(missing) <= 0:
                break
            request, row = forks[i]
            if not lenders[request.share].helps(missing):
                continue
            own = len(request.forks[row])
            lenders[request.share] -= Part(1, own)
            taken.setdefault(request, []).append(row)
            missing -= Part(self._rows.is_free_at_once(row), own)
        for request, its in taken.items():
            request.share.counters["draft_narrowed"] += len(its)
            self._prune(request, its)

    def _has_room(self, rows: int, blocks: int) -> bool:
        return max(self._missing(rows, blocks)) <= 0

    def _missing(self, rows: int, blocks: int) -> Part:
        return Part(rows - self._rows.free_count, blocks - self._blocks.free_count)

    def _within_reach(self, lenders: dict[Share, Part], idle: Sequence[Request]) -> float:
        """The most blocks that can be freed; shared ones count twice."""
        reach: float = self._blocks.free_count
        for share, most in lenders.items():
            if most.blocks > 0:
                held = [len(request.blocks) for request in idle if request.share is share]
                for request in share.requests.values():
                    held += map(len, request.forks.values())
                # What is taken last is taken whole, though less of it may be too much.
                reach += min(sum(held), most.blocks - 1 + max(held, default=0))
        return reach
