"""The owner of the draft's trees: one call applies a change and publishes it.

What changed since the last publication is gathered as messages. Between two decode steps trees come
before what was pruned and that before new forks, so a row may pass from one request to another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vllm_ssd.core.arrays import BoolArray, Int32Array
from vllm_ssd.core.tree import SpeculationCache
from vllm_ssd.draft.request import DORMANT
from vllm_ssd.wire.messages import Forked, Planted, Pruned, Stepped, ToTarget, pack


@dataclass(slots=True)
class _Planted:
    """A tree that is not published yet."""

    base: int
    trunk: int
    tokens: Int32Array
    ended: bool


@dataclass(slots=True)
class _Forked:
    """Forks of one request that are not published yet; parallel lists."""

    k: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    complete: bool = False


_WITHDRAWN = _Planted(0, DORMANT, np.zeros(0, np.int32), False)


class Trees:
    """The trees of all requests, and what the target must be told of them.

    Args:
        max_rows: rows of the draft's batch.
        width: tokens a row can hold.
    """

    def __init__(self, max_rows: int, width: int) -> None:
        self.cache = SpeculationCache(max_rows, width)
        """To read from."""
        self._planted: dict[int, _Planted] = {}
        self._pruned: dict[int, list[int]] = {}
        self._forked: dict[int, _Forked] = {}
        self._messages: list[ToTarget] = []

    def clear(self) -> None:
        """Forget all trees, and what was to be published."""
        self.cache.clear()
        self._messages.clear()
        for gathered in (self._planted, self._pruned, self._forked):
            gathered.clear()

    def plant(self, handle: int, base: int, trunk: int, tokens: Int32Array, ended: bool) -> None:
        """A request's next tree; its forks are gone with the tree before.

        Args:
            handle: the request.
            base: length of its confirmed text.
            trunk: row of the trunk.
            tokens: ``[m]``, the trunk's tokens after that text.
            ended: whether the trunk ends with them.
        """
        self.cache.plant(handle, base, trunk, tokens, ended)
        self._forget_gathered(handle)
        self._planted[handle] = _Planted(base, trunk, tokens, ended)

    def fork(
        self, handle: int, k: list[int], tokens: list[int], rows: list[int], complete: bool
    ) -> None:
        """Forks of a request's tree: after k trunk tokens, with their first token, on their rows.

        Args:
            complete: whether no more forks will come for this tree.
        """
        if rows:
            self.cache.add_forks(
                [handle],
                [len(rows)],
                np.array(k, np.int32),
                np.array(tokens, np.int32),
                np.array(rows, np.int32),
            )
        new = self._forked.setdefault(handle, _Forked())
        new.k += k
        new.tokens += tokens
        new.rows += rows
        new.complete = complete

    def prune(self, handle: int, rows: list[int]) -> None:
        """Take forks off a request's tree."""
        self.cache.prune([handle], [len(rows)], np.array(rows, np.int32))
        new = self._forked.get(handle)
        for row in rows:
            if new is not None and row in new.rows:
                at = new.rows.index(row)
                for held in (new.k, new.tokens, new.rows):
                    del held[at]
            else:
                self._pruned.setdefault(handle, []).append(row)

    def step(self, rows: Int32Array, tokens: Int32Array, ended: BoolArray) -> None:
        """One decode step: each of ``rows`` grows by its token; some end with it. ``[m]`` all."""
        if not len(rows):
            return
        self.cache.append(rows, tokens)
        self.cache.ended[rows] = ended
        self._flush()
        self._messages.append(Stepped(pack(rows), pack(tokens), pack(rows[ended])))

    def withdraw(self, handle: int) -> None:
        """A request has no tree any more."""
        self.forget(handle)
        self._planted[handle] = _WITHDRAWN

    def forget(self, handle: int) -> None:
        """A request is over: the target needs to know nothing more."""
        self.cache.trees.pop(handle, None)
        self._forget_gathered(handle)

    def _forget_gathered(self, handle: int) -> None:
        for gathered in (self._planted, self._pruned, self._forked):
            gathered.pop(handle, None)

    # ---- publication

    def take_messages(self) -> list[ToTarget]:
        """What changed since the last call, in the order in which the target must apply it."""
        self._flush()
        messages, self._messages = self._messages, []
        return messages

    def _flush(self) -> None:
        """Make messages of what was gathered."""
        if self._planted:
            self._messages.append(_planted_message(self._planted))
            self._planted.clear()
        if self._pruned:
            rows = [row for some in self._pruned.values() for row in some]
            counts = [len(some) for some in self._pruned.values()]
            self._messages.append(Pruned(pack(list(self._pruned)), pack(counts), pack(rows)))
            self._pruned.clear()
        if self._forked:
            self._messages.append(_forked_message(self._forked))
            self._forked.clear()


def _planted_message(planted: dict[int, _Planted]) -> Planted:
    trees = planted.values()
    return Planted(
        pack(list(planted)),
        pack([tree.base for tree in trees]),
        pack([tree.trunk for tree in trees]),
        pack([len(tree.tokens) for tree in trees]),
        pack([int(tree.ended) for tree in trees]),
        pack(np.concatenate([tree.tokens for tree in trees])),
    )


def _forked_message(forked: dict[int, _Forked]) -> Forked:
    forks = forked.values()
    return Forked(
        pack(list(forked)),
        pack([len(new.rows) for new in forks]),
        pack([int(new.complete) for new in forks]),
        pack([k for new in forks for k in new.k]),
        pack([token for new in forks for token in new.tokens]),
        pack([row for new in forks for row in new.rows]),
    )
