"""What targets that share a draft may take from each other.

The fair share of a target is the same part of the rows and KV blocks for each. What is free goes to
whoever asks first. When nothing is, a target that holds less than its fair share gets what others
hold beyond theirs: the least likely forks, then requests that are not in use. What a target uses
within its fair share is its own. One that has been quiet for a while is not using anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_ssd.draft.request import Request
from vllm_ssd.draft.rows import Rows
from vllm_ssd.draft.share import Share


class Fairness:
    """Decides who gives up what.

    Args:
        shares: of all targets; the list is the caller's and changes.
        rows: the rows of the batch.
        blocks: how many KV blocks there are.
    """

    def __init__(self, shares: list[Share], rows: Rows, blocks: int) -> None:
        self._shares = shares
        self._rows = rows
        self._blocks = blocks

    def left(self, share: Share) -> tuple[int, int]:
        """Rows and blocks that a target may still claim; negative if it holds more than is fair."""
        count = len(self._shares)
        rows = len(self._rows.start) // count - share.held_rows()
        return rows, self._blocks // count - share.held_blocks()

    def lenders(self, share: Share, rows: int, blocks: int) -> list[Share]:
        """The targets that may have to give something up.

        Args:
            share: of the target that wants more.
            rows: how many.
            blocks: how many.
        """
        others = [other for other in self._shares if other is not share]
        if others:
            rows_left, blocks_left = self.left(share)
            fair = rows <= rows_left and blocks <= blocks_left
            others = [other for other in others if other.quiet or (fair and self._beyond(other))]
        return [share, *others]

    def idle(self, lenders: Sequence[Share]) -> list[Request]:
        """Their requests that are not in use, those of quiet targets and the oldest first."""
        idle = [request for share in lenders for request in share.idle()]
        idle.sort(
            key=lambda request: (not request.share.quiet, request.last_used - request.share.round)
        )
        return idle

    def least_likely(self, lenders: Sequence[Share]) -> list[tuple[Request, int]]:
        """Their forks with their rows, the least likely first."""
        forks = [
            (request, row)
            for share in lenders
            for request in share.requests.values()
            for row in request.forks
        ]
        chances = self._rows.chance[[row for _, row in forks]]
        return [forks[i] for i in np.argsort(chances, kind="stable").tolist()]

    def must_give(self, lender: Share, share: Share) -> bool:
        """Whether one of :meth:`lenders` still has to give something up."""
        return lender is share or lender.quiet or self._beyond(lender)

    def _beyond(self, share: Share) -> bool:
        """Whether a target holds more than its fair share."""
        return min(self.left(share)) < 0
