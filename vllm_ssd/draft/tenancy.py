"""Who holds rows and KV blocks, and who gives way when they run short.

Short of either, the draft narrows (forks go first), then requests that the target has not wanted
lately lose their KV and are prefilled again when they come back; it never fails.
"""

from __future__ import annotations

import numpy as np

from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.draft.blocks import KVBlocks
from vllm_ssd.draft.model import DraftModel
from vllm_ssd.draft.publisher import Publisher
from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.rows import Rows


class Tenancy:
    """Requests, and what each of them holds.

    Args:
        model: copies the one block a fork shares in part.
        rows: the rows of the batch.
        blocks: the blocks of the KV cache.
        counters: counters to keep.
    """

    def __init__(
        self, model: DraftModel, rows: Rows, blocks: KVBlocks, counters: dict[str, float]
    ) -> None:
        self.rows = rows
        self.blocks = blocks
        self.publisher = Publisher(rows.cache)
        self.requests: dict[int, Request] = {}
        self.catching_up: dict[int, Request] = {}
        """Requests whose trunk has more than one confirmed token to compute."""
        self.frame = 0
        """Frames of outcomes so far: the clock of :attr:`Request.last_used`."""
        self._model = model
        self._counters = counters

    # ---- trunks

    def admit(self, request: Request) -> bool:
        """Give a request a trunk row and its cached prefix; False if no row can be had."""
        while self.rows.free_count == 0:
            if not self._make_room(request):
                return False
        trunk = request.trunk = self.rows.take(1)[0]
        text = request.text[: request.length]
        request.blocks = self.blocks.cached_prefix(text, request.prefix)
        request.shared_blocks = len(request.blocks)
        ids = [block.block_id for block in request.blocks]
        self.rows.block_table[trunk, : len(ids)] = ids
        self.rows.stop[trunk] = request.stop
        self.cut_back(request, len(ids) * self.blocks.block_size)
        return True

    def release(self, request: Request) -> None:
        """Take everything from a request but its text."""
        if request.trunk == DORMANT:
            return
        self.drop_forks(request)
        self.rows.give_back([request.trunk])
        self.blocks.give_back(request.blocks)
        request.blocks = []
        request.trunk = DORMANT
        request.forks_wanted = []
        self.catching_up.pop(request.handle, None)
        self.publisher.withdraw(request.handle)

    def remove(self, request: Request) -> None:
        """A request is over."""
        self.release(request)
        self.publisher.forget(request.handle)
        del self.requests[request.handle]

    def cut_back(self, request: Request, computed: int) -> None:
        """Keep ``computed`` positions of the trunk; the confirmed tokens after them come next."""
        rows, trunk = self.rows, request.trunk
        rows.restart(trunk, request.length, computed)
        if request.length - computed == 1:
            rows.feed_token[trunk] = request.text[computed]
            rows.pending[trunk] = True
            self.catching_up.pop(request.handle, None)
        else:
            self.catching_up[request.handle] = request

    def cover(self, request: Request, length: int) -> bool:
        """See that the trunk has blocks for ``length`` positions; False if they cannot be had."""
        missing = -(-length // self.blocks.block_size) - len(request.blocks)
        if missing <= 0:
            return True
        short = self.blocks.free_count < missing
        if short and missing > self._within_reach(request):
            return False  # nobody is to give way in vain
        while self.blocks.free_count < missing:
            if not self._make_room(request):
                return False
        new = self.blocks.take(missing)
        first = len(request.blocks)
        self.rows.block_table[request.trunk, first : first + missing] = [b.block_id for b in new]
        request.blocks += new
        return True

    def leap(self, request: Request) -> None:
        """Skip what others have computed since: prompts that begin alike may arrive together."""
        text = request.text[: request.length]
        first = request.shared_blocks
        found = self.blocks.cached_prefix(text, request.prefix, first)
        if not found:
            return
        end = first + len(found)
        self.blocks.give_back(request.blocks[first:end])
        request.blocks[first:end] = found
        request.shared_blocks = end
        self.rows.block_table[request.trunk, first:end] = [block.block_id for block in found]
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

    def add_forks(
        self, request: Request, k: Int32Array, tokens: Int32Array, room: Int32Array
    ) -> list[int]:
        """Fork the trunk while rows and blocks last.

        A fork shares the trunk's blocks that are full where it starts and owns a copy of the one
        that is partly full, so at most one block is copied.

        Args:
            request: whose trunk.
            k: ``[forks]``, after how many tokens beyond the confirmed text each one starts.
            tokens: ``[forks]``, its first token.
            room: ``[forks]``, how many more tokens it may grow by.

        Returns:
            The rows made, for the first entries of ``k``.
        """
        rows, size = self.rows, self.blocks.block_size
        starts = request.length + k
        first = starts // size
        counts = (starts + room) // size - first + 1
        too_many = np.flatnonzero(np.cumsum(counts) > self.blocks.free_count)
        affordable = int(too_many[0]) if too_many.size else len(k)
        count = min(rows.free_count, affordable)
        self._counters["draft_narrowed"] += max(0, len(k) - count)
        count = min(count, len(k))
        if count == 0:
            return []
        made = rows.take(count)
        index = np.array(made, np.int32)
        rows.block_table[index] = rows.block_table[request.trunk]
        blocks = self.blocks.take(int(counts[:count].sum()))
        sources, destinations, at = [], [], 0
        for row, start, block, own_count in zip(
            made, starts.tolist(), first.tolist(), counts.tolist(), strict=False
        ):
            own = blocks[at : at + own_count]
            at += own_count
            request.forks[row] = own
            rows.block_table[row, block : block + own_count] = [b.block_id for b in own]
            if start % size:
                sources.append(request.blocks[block].block_id)
                destinations.append(own[0].block_id)
        if sources:
            self._model.copy_blocks(sources, destinations)
        rows.start[index] = starts[:count]
        rows.computed[index] = starts[:count]
        rows.feed_token[index] = tokens[:count]
        rows.room[index] = room[:count]
        rows.stop[index] = request.stop
        rows.pending[index] = True
        rows.cache.add_forks([request.handle], [count], k[:count], tokens[:count], index)
        self._counters["draft_forks"] += count
        return made

    def adopt(self, request: Request, row: int) -> None:
        """Make a fork the trunk: its own blocks replace the trunk's from its start on."""
        own = request.forks.pop(row)
        first_own = int(self.rows.start[row]) // self.blocks.block_size
        self.blocks.give_back(request.blocks[first_own:])
        request.blocks[first_own:] = own
        self.rows.give_back([request.trunk])
        request.trunk = row

    def drop_forks(self, request: Request) -> None:
        """Free all forks of a request."""
        for own in request.forks.values():
            self.blocks.give_back(own)
        self.rows.give_back(list(request.forks))
        request.forks.clear()

    # ---- shortage

    def _make_room(self, wanting: Request) -> bool:
        """Free something: forks first, then the request that was not wanted for longest.

        Requests the target wanted in this very frame keep their trunk: taking turns among them
        would draft for none.
        """
        for request in self.requests.values():
            if request.forks:
                self._counters["draft_narrowed"] += len(request.forks)
                self.drop_forks(request)
                request.forks_wanted = []
                self.publisher.plant(request)
                self.publisher.fork(request, [], [], [])
                return True
        idle = self._idle(wanting)
        if not idle:
            return False
        self._counters["draft_evictions"] += 1
        self.release(min(idle, key=lambda request: request.last_used))
        return True

    def _idle(self, wanting: Request) -> list[Request]:
        """Requests that may lose their KV to ``wanting``."""
        return [
            request
            for request in self.requests.values()
            if request is not wanting
            and request.trunk != DORMANT
            and request.last_used < self.frame
        ]

    def _within_reach(self, wanting: Request) -> int:
        """The most blocks that can be had, everybody else giving way; shared ones count twice."""
        forks = sum(
            len(own) for request in self.requests.values() for own in request.forks.values()
        )
        trunks = sum(len(request.blocks) for request in self._idle(wanting))
        return self.blocks.free_count + forks + trunks
