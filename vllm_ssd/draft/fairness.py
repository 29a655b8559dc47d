"""What targets that share a draft may take from each other.

The fair share of a target is the same part of the rows and KV blocks for each. What is free goes to
whoever asks first. When nothing is, a target that holds less than its fair share gets what others
hold beyond theirs: the least likely forks, then requests that are not in use. What a target uses
within its fair share is its own. One that has been quiet for a while is not using anything.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from vllm_ssd.draft.share import Share


class Part(NamedTuple):
    """Rows and KV blocks."""

    rows: float
    blocks: float

    def __sub__(self, other: Part) -> Part:
        return Part(self.rows - other.rows, self.blocks - other.blocks)

    def helps(self, missing: Part) -> bool:
        """Whether who may give this up has some of what is missing: rows are no use for blocks."""
        return (self.rows > 0 and missing.rows > 0) or (self.blocks > 0 and missing.blocks > 0)


ALL = Part(math.inf, math.inf)


class Fairness:
    """Decides who gives up how much.

    Args:
        shares: of all targets; the list is the caller's and changes.
        whole: rows and blocks of the draft.
    """

    def __init__(self, shares: list[Share], whole: Part) -> None:
        self._shares = shares
        self._whole = whole

    def left(self, share: Share) -> Part:
        """What a target may still claim; negative where it holds more than is fair."""
        return self._fair() - Part(share.held_rows(), share.held_blocks())

    def lenders(self, share: Share, wanted: Part) -> dict[Share, Part]:
        """The targets that have to give something up, and at most how much.

        Args:
            share: of the target that wants more; it gives up whatever it can itself.
            wanted: how much.
        """
        found = {share: ALL}
        others = [other for other in self._shares if other is not share]
        if others:
            left = self.left(share)
            fair = all(more <= 0 or more <= its for more, its in zip(wanted, left, strict=True))
            for other in others:
                beyond = Part(0.0, 0.0) - self.left(other)
                if other.quiet:
                    found[other] = ALL
                elif fair and beyond.helps(wanted):
                    found[other] = beyond
        return found

    def _fair(self) -> Part:
        count = max(1, len(self._shares))
        return Part(self._whole.rows // count, self._whole.blocks // count)
