"""The trees that the draft publishes, validated before they enter the speculation cache."""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter

import numpy as np

from vllm_ssd.core.arrays import Float32Array, Int32Array, Int64Array
from vllm_ssd.core.distributions import ROUNDING, Distributions, Kept
from vllm_ssd.core.tree import SpeculationCache, row_width
from vllm_ssd.wire.messages import MAX_ROWS, Forked, Planted, Pruned, Ready, Stepped
from vllm_ssd.wire.packing import unpack, unpack_floats, unpack_list

_UINT32 = np.dtype("<u4")
_BITS_OF_1 = 0x3F800000
"""The float32 1.0 as an integer."""


class PublishedTrees:
    """The target's copy of the speculation trees. No message of the draft can break it.

    Args:
        num_speculative_tokens: K.
        vocab_size: the target's; ids from there on are refused.
        sampled_from: the most tokens of the distributions that tokens are sampled from; 0 if none
            are sampled.
    """

    def __init__(self, num_speculative_tokens: int, vocab_size: int, sampled_from: int = 0) -> None:
        self.cache = SpeculationCache(1, 1)
        self.distributions: Distributions | None = None
        """What the cache's tokens were sampled from; ``None`` if none are sampled."""
        self._kept: Kept | None = None
        """The same, for what is told of it."""
        self.withdrawn: set[int] = set()
        """Handles of requests that have no tree in the draft now."""
        self._announced: set[int] = set()
        self._width = row_width(num_speculative_tokens)
        self._vocab_size = vocab_size
        self._sampled_from = sampled_from

    def clear(self) -> None:
        """Forget all requests."""
        self.cache.clear()
        self.withdrawn.clear()
        self._announced.clear()

    def announce(self, handle: int) -> None:
        """This request is announced to the draft: its trees are kept from now on."""
        self._announced.add(handle)

    def drop(self, handle: int) -> None:
        """Forget a request; trees of it that are still on their way will be dropped."""
        self._announced.discard(handle)
        self.withdrawn.discard(handle)
        self.cache.trees.pop(handle, None)

    # ---- messages; each raises ValueError or IndexError if it does not make sense

    def start(self, message: Ready) -> None:
        """A draft has come up: an empty cache with as many rows as it has."""
        if not 0 < message.max_rows <= MAX_ROWS:
            raise ValueError(f"{message.max_rows} rows")
        self.cache = SpeculationCache(message.max_rows, self._width)
        if self._sampled_from:
            self._keep(message.max_rows)

    def _keep(self, max_rows: int) -> None:
        """Tokens may be sampled: keep what from."""
        self._kept = self.distributions = Distributions(max_rows, self._width, self._sampled_from)

    def steps(self, messages: list[Stepped]) -> None:
        """Rows have grown by one token in each of some steps.

        During a verification the same rows grow several times: such steps are applied as one
        array.
        """
        for packed, run in groupby(messages, key=attrgetter("rows")):
            self._grow(packed, list(run))

    def _grow(self, packed_rows: bytes, steps: list[Stepped]) -> None:
        rows = _indices(packed_rows)
        packed_tokens = [step.tokens for step in steps]
        packed_chances = [step.chances for step in steps]
        # Each step by itself: in the total, the errors of two could cancel out.
        if {len(packed_rows)} != {*map(len, packed_tokens), *map(len, packed_chances)}:
            raise ValueError("a step that does not fit its rows")
        tokens, chances = unpack(b"".join(packed_tokens)), _chances(b"".join(packed_chances))
        self._check_tokens(tokens)
        shape = len(steps), len(rows)
        ended = _indices(b"".join([step.ended for step in steps]))
        # Before the tokens, which a device may find at once.
        self._sample(rows, tokens.reshape(shape), steps)
        self.cache.append(rows, tokens.reshape(shape), chances.reshape(shape))
        if len(ended):
            # After the length: a device that leaves out the last token, since it ends the row, must
            # not leave out the one before, which may have been sampled.
            self.cache.ended[ended] = True

    def _sample(self, rows: Int64Array, grown: Int32Array, steps: list[Stepped]) -> None:
        """Keep what the tokens that rows will grow by were sampled from.

        Args:
            rows: ``[n]``.
            grown: ``[steps, n]``, these tokens.
            steps: the messages.
        """
        distributions = self._kept
        if distributions is None:
            if any(step.sampled for step in steps):
                raise ValueError("sampled tokens, though none were asked for")
            return
        sampled = [(i, _indices(step.sampled)) for i, step in enumerate(steps) if step.sampled]
        if not sampled and distributions.empty:
            return
        cache = self.cache
        first = cache.start[rows] + cache.length[rows]
        distributions.certain(rows, first + np.arange(len(steps), dtype=np.int32)[:, None])
        if not sampled:
            return
        which = np.concatenate([indices for _, indices in sampled])
        later = np.repeat([i for i, _ in sampled], [len(indices) for _, indices in sampled])
        supports = unpack(b"".join([step.supports for step in steps]))
        tokens = unpack(b"".join([step.q_tokens for step in steps]))
        probabilities = unpack_floats(b"".join([step.q_probabilities for step in steps]))
        if not len(which) == len(supports) or not len(tokens) == len(probabilities):
            raise ValueError("distributions of different lengths")
        most = np.maximum.reduce(supports)
        if not 0 < np.minimum.reduce(supports) <= most <= distributions.most:
            raise ValueError(f"a distribution over {most} tokens, or over none")
        _check_counts([int(supports.sum())], len(tokens))
        self._check_tokens(tokens)
        # Also refuses what is not a number: no comparison with that holds.
        if not np.minimum.reduce(probabilities) > 0.0:
            raise ValueError("a probability that is not above 0")
        positions = (first[which] + later).astype(np.int32)
        drafted = grown[later, which]
        distributions.sampled(rows[which], positions, supports, tokens, probabilities, drafted)

    def distributions_of(
        self, rows: Int64Array, positions: Int64Array, tokens: Int64Array
    ) -> tuple[Int64Array, Int32Array, Float32Array]:
        """What tokens were sampled from (:meth:`Distributions.look_up`), checked.

        Only the few that are proposed are checked whether they are distributions, and of these
        tokens: for all that are drafted this would take milliseconds.

        Args:
            rows: ``[n]``, as there.
            positions: ``[n]``, as there.
            tokens: ``[n]``.

        Raises:
            ValueError: a token cannot have been sampled from its distribution.
        """
        if self.distributions is None:
            none = np.zeros(0, np.int32)
            return np.zeros(len(rows), np.int64), none, none.astype(np.float32)
        found = supports, among, probabilities = self.distributions.look_up(rows, positions)
        held = supports[supports > 0]
        if len(held):
            first = held.cumsum() - held
            if not (np.abs(np.add.reduceat(probabilities, first) - 1.0) <= ROUNDING).all():
                raise ValueError("probabilities that do not add up to 1")
            if not np.logical_or.reduceat(among == np.repeat(tokens, supports), first).all():
                raise ValueError("a token that is not in its distribution")
        return found

    def plant(self, message: Planted) -> None:
        """Trees replace the requests' former ones."""
        handles, bases = unpack_list(message.handles), unpack_list(message.bases)
        trunks, counts = unpack_list(message.trunks), unpack_list(message.counts)
        ended, tokens = unpack_list(message.ended), unpack(message.tokens)
        chances = _chances(message.chances)
        if not len(handles) == len(bases) == len(trunks) == len(counts) == len(ended):
            raise ValueError("trees of different lengths")
        if len(tokens) != len(chances):
            raise ValueError("not one chance for each token")
        if trunks and max(trunks) >= len(self.cache.length):
            raise ValueError("a row that does not exist")
        self._check_tokens(tokens)
        _check_counts(counts, len(tokens))
        if counts and max(counts) > self._width:
            raise ValueError(f"{max(counts)} tokens for a trunk")
        if trunks and min(trunks) < 0:
            trees = list(zip(handles, bases, trunks, counts, ended, strict=True))
            if any(count for _, _, trunk, count, _ in trees if trunk < 0):
                raise ValueError("tokens without a trunk")
            gone = [tree[0] for tree in trees if tree[2] < 0]
            for handle in gone:
                self.cache.trees.pop(handle, None)
            self.withdrawn |= self._announced.intersection(gone)
            kept = [tree for tree in trees if tree[2] >= 0]
            handles, bases, trunks, counts, ended = ([tree[i] for tree in kept] for i in range(5))
        self.withdrawn.difference_update(handles)
        if self._kept is not None and not self._kept.empty:
            # A trunk that was a row of its tree before keeps what its tokens were sampled from.
            before = [self.cache.trees.get(handle) for handle in handles]
            pairs = zip(before, trunks, strict=True)
            self._kept.forget([t for tree, t in pairs if not (tree and tree.has(t))])
        self.cache.plant_all(handles, bases, trunks, counts, tokens, chances, ended)
        # Those have finished. Their rows are planted all the same: they grow until the draft has
        # the message.
        for handle in set(handles) - self._announced:
            self.cache.trees.pop(handle, None)

    def fork(self, message: Forked) -> None:
        """Trees have got more forks."""
        handles, counts = unpack_list(message.handles), unpack_list(message.counts)
        k, tokens, rows = unpack(message.k), unpack(message.tokens), _indices(message.rows)
        self._check_tokens(tokens)
        _check_counts(counts, len(rows))
        if not len(k) == len(tokens) == len(rows):
            raise ValueError("forks of different lengths")
        if self._kept is not None:
            self._kept.forget(rows)
        self.cache.add_forks(handles, counts, k, tokens, rows)
        for handle, complete in zip(handles, unpack_list(message.complete), strict=True):
            tree = self.cache.trees.get(handle)
            if tree is not None:
                tree.complete = bool(complete)

    def prune(self, message: Pruned) -> None:
        """Trees have lost forks."""
        handles, counts = unpack_list(message.handles), unpack_list(message.counts)
        rows = unpack(message.rows)
        _check_counts(counts, len(rows))
        self.cache.prune(handles, counts, rows)

    def _check_tokens(self, tokens: Int32Array) -> None:
        if not _all_below(tokens, self._vocab_size):
            raise ValueError("a token outside the vocabulary")


def _check_counts(counts: list[int], total: int) -> None:
    if sum(counts) != total or (counts and min(counts) < 0):
        raise ValueError(f"counts that do not add up to {total}")


def _chances(data: bytes) -> Float32Array:
    """Float32 numbers from 0 to 1, which as integers are those up to that of 1; one pass."""
    if not _all_below(unpack(data), _BITS_OF_1 + 1):
        raise ValueError("a chance that is not from 0 to 1")
    return unpack_floats(data)


def _all_below(values: Int32Array, limit: int) -> bool:
    """Whether all values are in ``range(limit)``; one pass, since negative ones become huge."""
    return not values.size or bool(np.maximum.reduce(values.view(np.uint32)) < limit)


def _indices(data: bytes) -> Int64Array:
    """Row numbers, none of them negative: indexing with them fails where there is no such row.

    Indexing with 64 bits is faster.
    """
    return np.frombuffer(data, _UINT32).astype(np.int64)
