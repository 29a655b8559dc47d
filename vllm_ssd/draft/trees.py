"""The owner of the draft's trees: one call applies a change and publishes it.

What changed since the last publication is a list of messages in the order of the changes, so a row
may pass from one request to another. Trees planted one after the other share a message.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from vllm_ssd.core.arrays import Float32Array, Int32Array
from vllm_ssd.core.tree import SpeculationCache
from vllm_ssd.draft.request import DORMANT
from vllm_ssd.draft.rows import Grown
from vllm_ssd.wire.messages import Forked, Planted, Pruned, Stepped, ToTarget
from vllm_ssd.wire.packing import pack, pack_floats


class _Tree(NamedTuple):
    """A tree that is not published yet."""

    base: int
    trunk: int
    tokens: Int32Array
    chances: Float32Array
    ended: bool


_NO_TREE = _Tree(0, DORMANT, np.zeros(0, np.int32), np.zeros(0, np.float32), False)


class Trees:
    """The trees of all requests, and the changes to publish.

    Args:
        max_rows: rows of the draft's batch.
        width: tokens a row can hold.
    """

    def __init__(self, max_rows: int, width: int) -> None:
        self.cache = SpeculationCache(max_rows, width)
        """For reading; only this class changes it."""
        self._planted: dict[int, _Tree] = {}
        """Trees planted or withdrawn since the newest message, by request."""
        self._messages: list[ToTarget] = []

    def clear(self) -> None:
        """Forget all trees, and what was to be published."""
        self.cache.clear()
        self._planted.clear()
        self._messages.clear()

    def plant(self, handle: int, base: int, trunk: int, tokens: Int32Array, ended: bool) -> None:
        """Plant a request's next tree; the one before is dropped with its forks.

        Args:
            handle: the request.
            base: length of its confirmed text.
            trunk: row of the trunk.
            tokens: ``[m]``, the trunk's tokens after that text; the row holds them already.
            ended: whether the trunk ends with them.
        """
        shift = base - int(self.cache.start[trunk])
        chances = self.cache.chance[trunk, shift : shift + len(tokens)].copy()
        self.cache.plant(handle, base, trunk, tokens, chances, ended)
        self._planted.pop(handle, None)
        self._planted[handle] = _Tree(base, trunk, tokens, chances, ended)

    def withdraw(self, handle: int) -> None:
        """Drop a request's tree, and publish that it has none."""
        self.cache.trees.pop(handle, None)
        self._planted.pop(handle, None)
        self._planted[handle] = _NO_TREE

    def forget(self, handle: int) -> None:
        """Drop a finished request's tree; the target needs no message for it."""
        self.cache.trees.pop(handle, None)
        self._planted.pop(handle, None)

    def fork(
        self,
        handles: list[int],
        counts: list[int],
        complete: list[bool],
        k: Int32Array,
        tokens: Int32Array,
        rows: Int32Array,
    ) -> None:
        """Add forks to several trees.

        Args:
            handles: the requests.
            counts: how many forks each gets.
            complete: whether its tree gets no more forks.
            k: ``[forks]``, after how many trunk tokens each fork starts, grouped by request.
            tokens: ``[forks]``, its first token.
            rows: ``[forks]``, its row.
        """
        self.cache.add_forks(handles, counts, k, tokens, rows)
        self._close()
        self._messages.append(
            Forked(
                pack(handles),
                pack(counts),
                pack([int(all_made) for all_made in complete]),
                pack(k),
                pack(tokens),
                pack(rows),
            )
        )

    def prune(self, handle: int, rows: list[int]) -> None:
        """Take forks off a request's tree."""
        self.cache.prune([handle], [len(rows)], np.array(rows, np.int32))
        self._close()
        handles, counts, packed = pack([handle]), pack([len(rows)]), pack(rows)
        last = self._messages[-1] if self._messages else None
        if isinstance(last, Pruned):  # those of several requests share a message
            handles, counts = last.handles + handles, last.counts + counts
            self._messages[-1] = Pruned(handles, counts, last.rows + packed)
        else:
            self._messages.append(Pruned(handles, counts, packed))

    def step(self, grown: Grown, chances: Float32Array) -> None:
        """One decode step: rows grow by a token each, some end with it.

        Args:
            grown: the rows and their tokens.
            chances: ``[m]``, the chance that the target accepts each token.
        """
        rows, tokens = grown.rows, grown.tokens
        if not len(rows):
            return
        self.cache.append(rows, tokens, chances)
        self.cache.ended[rows] = grown.ended
        self._close()
        message = Stepped(pack(rows), pack(tokens), pack(rows[grown.ended]), pack_floats(chances))
        if len(grown.q_tokens):
            # Most distributions are over a few of the N tokens.
            among = grown.q_probabilities > 0.0
            message = replace(
                message,
                sampled=pack(np.flatnonzero(grown.sampled).astype(np.int32)),
                supports=pack(among.sum(axis=1, dtype=np.int32)),
                q_tokens=pack(grown.q_tokens[among]),
                q_probabilities=pack_floats(grown.q_probabilities[among]),
            )
        self._messages.append(message)

    def take_messages(self) -> list[ToTarget]:
        """What changed since the last call, in the order in which the target must apply it."""
        self._close()
        messages, self._messages = self._messages, []
        return messages

    def _close(self) -> None:
        """Make a message of the trees planted since the newest one."""
        if not self._planted:
            return
        trees = self._planted.values()
        self._messages.append(
            Planted(
                pack(list(self._planted)),
                pack([tree.base for tree in trees]),
                pack([tree.trunk for tree in trees]),
                pack([len(tree.tokens) for tree in trees]),
                pack([int(tree.ended) for tree in trees]),
                pack(np.concatenate([tree.tokens for tree in trees])),
                pack_floats(np.concatenate([tree.chances for tree in trees])),
            )
        )
        self._planted.clear()
