"""The writer: what the draft publishes, validated, in the arrays that the device reads."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from vllm_ssd.core.arrays import Int32Array, Int64Array
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.target.v2.device_trees import NOTHING, DeviceTrees, pack_forks, pack_root
from vllm_ssd.wire.messages import Forked, Planted, Pruned, Ready
from vllm_ssd.wire.packing import unpack, unpack_list


class TreeWriter(PublishedTrees):
    """The published trees, whose rows are those of :class:`DeviceTrees`. One thread calls it.

    What the device may be reading is changed in an order that costs at most hits:

    * trees and forks are unlinked (their root, their key), then rows are written, then the new ones
      are linked: no root and no key ever leads to a row that is being rewritten;
    * a row grows by what its tokens are sampled from, then by the tokens, then by its length; its
      end is marked last.

    A look-up that read a root or a key just before it was unlinked may still read a row that is
    being rewritten. It finds tokens of the vocabulary even then, and verification judges them, as
    certain ones: the row has another life by then (:class:`.DeviceSources`).

    Args:
        arrays: what the device reads.
    """

    def __init__(self, arrays: DeviceTrees) -> None:
        sources = arrays.sources
        super().__init__(arrays.depth, arrays.vocab_size, sources.most if sources else 0)
        self._arrays = arrays
        self._slots: dict[int, int] = {}
        """Where each request is, by handle."""
        none = len(arrays.host_roots)
        self._owners = np.full(len(arrays.host_forks), none, np.int64)
        """``[rows]``, the slot whose fork a row is; as many as there are slots if it is none."""
        self._leaving = np.zeros(none + 1, np.bool_)
        """``[slots + 1]``, scratch of :meth:`_unlink`."""

    def assign(self, handle: int, slot: int) -> None:
        """A request has got a slot of the model runner."""
        self._slots[handle] = slot

    def start(self, message: Ready) -> None:
        """A draft has come up: an empty cache with as many rows as it has."""
        super().start(message)
        arrays, cache, rows = self._arrays, self.cache, message.max_rows
        cache.tokens = arrays.host_tokens[:rows]
        cache.length = arrays.host_length[:rows]
        cache.ended = arrays.host_ended[:rows]
        self._unlink_all()

    def _keep(self, max_rows: int) -> None:
        self._kept = self._arrays.sources

    def clear(self) -> None:
        """Forget all requests."""
        super().clear()
        self._slots.clear()
        self._unlink_all()

    def drop(self, handle: int) -> None:
        """Forget a request, and that it had a slot."""
        self._unlink([handle])
        self._slots.pop(handle, None)
        super().drop(handle)

    def plant(self, message: Planted) -> None:
        """Trees replace the requests' former ones."""
        handles = unpack_list(message.handles)
        self._unlink(handles)
        with self._rewriting(unpack(message.trunks)):
            super().plant(message)
        self._link(handles)

    def fork(self, message: Forked) -> None:
        """Trees have got more forks."""
        handles, counts = unpack_list(message.handles), unpack_list(message.counts)
        k = unpack(message.k)
        if k.size and not 0 <= k.min() <= k.max() <= self._arrays.width:
            raise ValueError("a fork that leaves its trunk where there is none")
        with self._rewriting(unpack(message.rows)):
            super().fork(message)
        none = len(self._arrays.host_roots)
        slots = [self._slots.get(h, none) if h in self.cache.trees else none for h in handles]
        owners = np.repeat(np.array(slots, np.int64), counts)
        rows, linked = unpack(message.rows), owners < none
        keys: Int64Array = pack_forks(owners, k.astype(np.int64), unpack(message.tokens))
        self._owners[rows] = owners
        self._arrays.host_forks[rows] = np.where(linked, keys, NOTHING)
        self._link(handles)  # some trees are complete now

    def prune(self, message: Pruned) -> None:
        """Trees have lost forks."""
        rows = unpack(message.rows)
        self._arrays.host_forks[rows] = NOTHING
        super().prune(message)

    def _rewriting(self, rows: Int32Array) -> AbstractContextManager[None]:
        """Rows get other tokens; some may not exist, which is for others to refuse."""
        sources = self._arrays.sources
        return nullcontext() if sources is None else sources.rewriting(rows)

    def _unlink(self, handles: Iterable[int]) -> None:
        """No root leads to these requests' trees any more, nor a key to their forks."""
        slots = [self._slots[handle] for handle in handles if handle in self._slots]
        if not slots:
            return
        self._arrays.host_roots[slots] = NOTHING
        self._leaving[slots] = True
        rows = np.flatnonzero(self._leaving[self._owners])
        self._leaving[slots] = False
        self._arrays.host_forks[rows] = NOTHING
        self._owners[rows] = len(self._arrays.host_roots)

    def _link(self, handles: Iterable[int]) -> None:
        """The roots of these requests lead to the trees that they have now."""
        trees = self.cache.trees
        found = [h for h in handles if h in trees and h in self._slots]
        slots = [self._slots[handle] for handle in found]
        roots = [pack_root(t.base, t.complete, t.trunk) for t in map(trees.__getitem__, found)]
        self._arrays.host_roots[slots] = roots

    def _unlink_all(self) -> None:
        self._arrays.clear()
        self._owners[:] = len(self._arrays.host_roots)
