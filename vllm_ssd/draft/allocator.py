"""Which request holds which rows and KV blocks.

What goes when they run short is decided in :mod:`vllm_ssd.draft.shortage`. It never fails.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vllm_ssd.core.arrays import Float64Array, Int32Array
from vllm_ssd.draft.blocks import KVBlocks
from vllm_ssd.draft.model import BlockChanges
from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.rows import Rows
from vllm_ssd.draft.share import Share
from vllm_ssd.draft.shortage import Shortage

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

logger = logging.getLogger("vllm.vllm_ssd.draft")


class Allocator:
    """Requests, and what each of them holds.

    Args:
        rows: the rows of the batch.
        blocks: the blocks of the KV cache.
    """

    def __init__(self, rows: Rows, blocks: KVBlocks) -> None:
        self.rows = rows
        self.blocks = blocks
        self.shares: list[Share] = []
        """One for each target."""
        self._shortage = Shortage(rows, blocks, self.shares, self.release, self.prune)
        self.catching_up: dict[Request, None] = {}
        """Requests whose trunk has more than one confirmed token to compute, in their order."""

    def requests(self) -> Iterator[Request]:
        """Those of all targets."""
        return itertools.chain.from_iterable(share.requests.values() for share in self.shares)

    def forget(self, share: Share) -> None:
        """Forget all requests of a target. The KV of verified prefixes stays in the cache.

        No step may be under way.
        """
        for request in share.requests.values():
            self.release(request)
        share.requests.clear()
        share.awaited.clear()
        share.trees.clear()
        # What an error lost, between taking it and noting its owner, is found again.
        held = [row for request in self.requests() for row in (request.trunk, *request.forks)]
        self.rows.free_others([row for row in held if row != DORMANT])
        if not held and not self.blocks.all_free:
            logger.warning("ssd draft: KV blocks lost in an error; emptying the prefix cache")
            self.blocks.reset()

    def take_changes(self) -> BlockChanges:
        """What has happened to blocks and block tables since the last call."""
        sources, destinations = self.blocks.take_copies()
        return self.rows.tables.take()._replace(sources=sources, destinations=destinations)

    # ---- trunks

    def admit(self, request: Request) -> bool:
        """Give a request a trunk row and its cached prefix; False if no row can be freed."""
        if not self._shortage.make_room(request, rows=1):
            return False
        trunk = request.trunk = self.rows.take(1)[0]
        text = request.text[: request.length]
        request.blocks = self.blocks.cached_prefix(text, request.prefix)
        request.shared_blocks = len(request.blocks)
        self.rows.tables.set(trunk, 0, [block.block_id for block in request.blocks])
        self.rows.owner[trunk] = request.share.index
        self.rows.sampled.begin(trunk)
        self.rows.stop[trunk] = request.stop
        self.cut_back(request, len(request.blocks) * self.blocks.block_size)
        return True

    def release(self, request: Request) -> None:
        """Free everything that a request holds; its text stays."""
        if request.trunk == DORMANT:
            return
        self.drop_forks([request])
        self.rows.give_back([request.trunk])
        self.blocks.give_back(request.blocks)
        request.blocks = []
        request.trunk = DORMANT
        self.catching_up.pop(request, None)
        request.share.trees.withdraw(request.handle)

    def remove(self, request: Request) -> None:
        """Forget a finished request."""
        share = request.share
        self.release(request)
        share.trees.forget(request.handle)
        share.awaited.pop(request.handle, None)
        del share.requests[request.handle]

    def cut_back(self, request: Request, computed: int) -> None:
        """Keep ``computed`` positions of the trunk; the confirmed tokens after them come next."""
        rows, trunk = self.rows, request.trunk
        rows.restart(trunk, request.length, computed)
        request.drafted = request.text[:0]
        request.ended = request.forced = False
        if request.length - computed == 1:
            rows.feed_token[trunk] = request.text[computed]
            rows.pending[trunk] = True
            self.catching_up.pop(request, None)
        else:
            self.catching_up[request] = None

    def cover(self, request: Request, length: int) -> bool:
        """Get the trunk blocks for ``length`` positions; False if not enough can be freed."""
        missing = -(-length // self.blocks.block_size) - len(request.blocks)
        if missing <= 0:
            return True
        if not self._shortage.make_room(request, blocks=missing):
            return False
        new = self.blocks.take(missing)
        first = len(request.blocks)
        self.rows.tables.set(request.trunk, first, [block.block_id for block in new])
        request.blocks += new
        return True

    def reuse_prefix(self, request: Request) -> None:
        """Use blocks that requests with the same prefix have cached meanwhile."""
        text = request.text[: request.length]
        first = request.shared_blocks
        found = self.blocks.cached_prefix(text, request.prefix, first)
        if not found:
            return
        end = first + len(found)
        self.blocks.give_back(request.blocks[first:end])
        request.blocks[first:end] = found
        request.shared_blocks = end
        self.rows.tables.set(request.trunk, first, [block.block_id for block in found])
        self.rows.computed[request.trunk] = end * self.blocks.block_size

    def share_verified(self, request: Request) -> None:
        """Enter the full blocks of verified, computed tokens into the prefix cache."""
        size = self.blocks.block_size
        full = min(request.length, int(self.rows.computed[request.trunk])) // size
        if full > request.shared_blocks:
            tokens = request.text[request.shared_blocks * size : full * size]
            self.blocks.share(tokens, request.shared_blocks, request.prefix, request.blocks)
            request.shared_blocks = full

    # ---- forks

    def affordable(self, share: Share, starts: Int32Array, room: Int32Array) -> int:
        """How many forks there are rows and blocks for, the first ones of those given.

        Args:
            share: of the target that they are for.
            starts: ``[forks]``, the position at which each one starts.
            room: ``[forks]``, how many tokens it may grow by after its first.
        """
        needed = np.cumsum(self._own_counts(starts, room))
        if len(self.shares) > 1 and len(starts):
            self._shortage.claim(share, len(starts), int(needed[-1]))
        blocks_for = int(np.searchsorted(needed, self.blocks.free_count, "right"))
        count = min(self.rows.free_count, blocks_for)
        share.counters["draft_narrowed"] += max(0, len(starts) - count)
        return count

    def add_forks(
        self,
        owners: Sequence[Request],
        starts: Int32Array,
        tokens: Int32Array,
        room: Int32Array,
        chances: Float64Array,
    ) -> Int32Array:
        """Fork trunks; rows and blocks are there (:meth:`affordable`).

        Args:
            owners: whose trunk each fork leaves.
            starts: ``[forks]``, the position of each one's first token.
            tokens: ``[forks]``, that token.
            room: ``[forks]``, how many more tokens it may grow by.
            chances: ``[forks]``, how likely its outcome is.

        Returns:
            The rows of the forks.
        """
        rows, size = self.rows, self.blocks.block_size
        made = np.array(rows.take(len(starts)), np.int32)
        trunks = np.array([request.trunk for request in owners], np.int32)
        at, counts = starts.tolist(), self._own_counts(starts, room).tolist()
        owned = self.blocks.fork([request.blocks for request in owners], at, counts)
        for request, row, start, own in zip(owners, made.tolist(), at, owned, strict=True):
            request.forks[row] = own
            ids = [block.block_id for block in own]
            rows.tables.fork(row, request.trunk, start // size, ids)
        rows.owner[made] = rows.owner[trunks]
        rows.start[made] = rows.computed[made] = starts
        rows.feed_token[made] = tokens
        rows.room[made] = room
        rows.stop[made] = rows.stop[trunks]
        rows.sampled.fork(made, trunks, starts)
        rows.chance[made] = chances
        rows.pending[made] = True
        return made

    def _own_counts(self, starts: Int32Array, room: Int32Array) -> Int32Array:
        """How many blocks forks have to own: those from their first token on."""
        size = self.blocks.block_size
        counts: Int32Array = (starts + room) // size - starts // size + 1
        return counts

    def adopt(self, request: Request, row: int) -> None:
        """Make a fork the trunk: its own blocks replace the trunk's from its start on."""
        own = request.forks.pop(row)
        first_own = int(self.rows.start[row]) // self.blocks.block_size
        self.blocks.give_back(request.blocks[first_own:])
        request.blocks[first_own:] = own
        self.rows.give_back([request.trunk])
        request.trunk = row
        request.forced = False

    def drop_forks(self, requests: Iterable[Request]) -> None:
        """Free all forks of requests; the caller replaces or withdraws their trees."""
        rows: list[int] = []
        blocks: list[KVCacheBlock] = []
        for request in requests:
            for row, own in request.forks.items():
                rows.append(row)
                blocks += own
            request.forks.clear()
        self.blocks.give_back(blocks)
        self.rows.give_back(rows)

    def give_up(self, request: Request, forks: list[int]) -> None:
        """As :meth:`prune`, for forks whose outcomes have proved less likely than others."""
        request.share.counters["draft_given_up"] += len(forks)
        self.prune(request, forks)

    def prune(self, request: Request, forks: list[int]) -> None:
        """Free some forks of a request and take them off its tree.

        Args:
            request: whose.
            forks: their rows.
        """
        for row in forks:
            self.blocks.give_back(request.forks.pop(row))
        request.made = {o: row for o, row in request.made.items() if row in request.forks}
        self.rows.give_back(forks)
        request.share.trees.prune(request.handle, forks)
