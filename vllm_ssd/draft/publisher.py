"""What the target must be told of the trees, gathered between two publications.

A publication is applied as a whole, trees before forks, so a row may pass from one request to
another within it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_ssd.core.tree import SpeculationCache
from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.wire.messages import Forked, Planted, ToTarget, pack


class _NewForks(NamedTuple):
    """Forks of one request that are not published yet; parallel lists."""

    request: Request
    k: list[int]
    tokens: list[int]
    rows: list[int]


class Publisher:
    """Gathers changes of the trees and makes messages of them.

    Args:
        cache: the draft's own trees, which a change is applied to at once.
    """

    def __init__(self, cache: SpeculationCache) -> None:
        self._cache = cache
        self._planted: dict[int, Request] = {}
        self._withdrawn: set[int] = set()
        self._forked: dict[int, _NewForks] = {}

    def plant(self, request: Request) -> None:
        """A new tree over the request's trunk as it is; nothing of the old one is published."""
        cache, trunk = self._cache, request.trunk
        tokens = cache.tokens[trunk, : cache.length[trunk]].copy()
        cache.plant(request.handle, request.length, trunk, tokens, bool(cache.ended[trunk]))
        self._withdrawn.discard(request.handle)
        self._forked.pop(request.handle, None)
        self._planted[request.handle] = request

    def fork(self, request: Request, k: list[int], tokens: list[int], rows: list[int]) -> None:
        """Forks added to the request's tree; empty lists to tell that no more will come."""
        new = self._forked.setdefault(request.handle, _NewForks(request, [], [], []))
        new.k.extend(k)
        new.tokens.extend(tokens)
        new.rows.extend(rows)

    def withdraw(self, handle: int) -> None:
        """The request has no tree any more."""
        self.forget(handle)
        self._withdrawn.add(handle)

    def forget(self, handle: int) -> None:
        """The request is over: the target needs to know nothing more."""
        self._cache.trees.pop(handle, None)
        self._planted.pop(handle, None)
        self._forked.pop(handle, None)
        self._withdrawn.discard(handle)

    def messages(self) -> list[ToTarget]:
        """What changed since the last call, in the order the target must apply it."""
        messages: list[ToTarget] = []
        if self._planted or self._withdrawn:
            messages.append(self._planted_message())
        if self._forked:
            messages.append(self._forked_message())
        return messages

    def _planted_message(self) -> Planted:
        cache = self._cache
        handles, bases, trunks, counts, ended = [], [], [], [], []
        tokens = [np.zeros(0, np.int32)]
        for request in self._planted.values():
            length = int(cache.length[request.trunk])
            handles.append(request.handle)
            bases.append(request.length)
            trunks.append(request.trunk)
            counts.append(length)
            ended.append(int(cache.ended[request.trunk]))
            tokens.append(cache.tokens[request.trunk, :length])
        for handle in self._withdrawn:
            handles.append(handle)
            bases.append(0)
            trunks.append(DORMANT)
            counts.append(0)
            ended.append(0)
        self._planted.clear()
        self._withdrawn.clear()
        return Planted(
            pack(handles),
            pack(bases),
            pack(trunks),
            pack(counts),
            pack(ended),
            pack(np.concatenate(tokens)),
        )

    def _forked_message(self) -> Forked:
        handles, counts, complete = [], [], []
        k: list[int] = []
        tokens: list[int] = []
        rows: list[int] = []
        for request, fork_k, fork_tokens, fork_rows in self._forked.values():
            handles.append(request.handle)
            counts.append(len(fork_rows))
            complete.append(int(request.next_k >= len(request.forks_wanted)))
            k += fork_k
            tokens += fork_tokens
            rows += fork_rows
        self._forked.clear()
        return Forked(
            pack(handles), pack(counts), pack(complete), pack(k), pack(tokens), pack(rows)
        )
