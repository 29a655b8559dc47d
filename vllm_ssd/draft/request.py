"""One request as the draft sees it: its confirmed text, its trunk, its forks, its blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vllm_ssd.core.arms import Block
from vllm_ssd.core.arrays import Int32Array

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from vllm_ssd.draft.blocks import VerifiedPrefix
    from vllm_ssd.draft.share import Share

DORMANT = -1
"""Trunk of a request that holds neither rows nor blocks, only its text."""


@dataclass(slots=True, eq=False)
class Request:
    """A request being drafted for."""

    share: Share
    """Of the target that it belongs to."""
    handle: int
    """Its number there."""
    text: Int32Array
    """Its confirmed tokens, ``text[:length]``; room up to ``limit``."""
    length: int
    limit: int
    """No token is drafted at this position or later."""
    stop: Int32Array
    """End tokens, ``[MAX_STOP_TOKENS]``, padded with -1."""
    prefix: VerifiedPrefix
    temperature: float = 0.0
    """Of its drafts; 0: a greedy request."""
    top_k: int = 0
    """0: no such bound."""
    top_p: float = 1.0
    setting: int = 0
    """:class:`vllm_ssd.core.arms.Settings`."""
    block: Block | None = None
    """The verifications with its arm, if it has a temperature."""
    trunk: int = DORMANT
    blocks: list[KVCacheBlock] = field(default_factory=list)
    """The trunk's blocks, in order of position."""
    shared_blocks: int = 0
    """How many of them, from the first on, are in the prefix cache."""
    forks: dict[int, list[KVCacheBlock]] = field(default_factory=dict)
    """Row of each fork, and the blocks that are its own."""
    verified: int = 0
    """n, how many tokens after ``length`` are being verified."""
    forced: bool = False
    """Some of the trunk's tokens may not be its own choices."""
    drafted: Int32Array = field(default_factory=lambda: np.zeros(0, np.int32))
    """What the trunk holds after the confirmed text when a round begins."""
    ended: bool = False
    """Whether the trunk ends with that."""
    prepared: bool = False
    """Whether the choices after the confirmed text were known when the round began."""
    made: dict[tuple[int, int], int] = field(default_factory=dict)
    """The rows of the forks made in this round, by outcome: k, and which of the choices t* is."""
    complete: bool = False
    """Whether no more forks will be made in this round."""
    next_k: int = 0
    """The choices for all k below this have been looked at."""
    last_used: int = 0
    """The last round that it took part in."""

    def append(self, tokens: list[int]) -> None:
        """Confirm more tokens."""
        end = self.length + len(tokens)
        if end > len(self.text):
            grown = np.zeros(max(end, 2 * len(self.text)), np.int32)
            grown[: self.length] = self.text[: self.length]
            self.text = grown
        self.text[self.length : end] = tokens
        self.length = end
