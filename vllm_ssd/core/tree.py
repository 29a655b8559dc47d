"""The speculation trees: what has been drafted, for which text.

Per request the tree has a *trunk*, the path that follows the confirmed text, and *forks*, one
for each guessed outcome: a fork after ``k`` trunk tokens starts with the guessed ``t*``. Trunk
and forks are rows of one token matrix that all requests share, so that one step of the draft is
applied as arrays. The draft keeps the original; the target keeps a copy, the speculation cache,
and applies what the draft publishes, in order.

Look-up is by content: the confirmed text is walked down the tree, there is no round number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arrays import Float32Array, Int32Array, Int64Array


def row_width(num_speculative_tokens: int) -> int:
    """Tokens a row holds at most: K being verified, the bonus token, K more, and one to spare."""
    return 2 * num_speculative_tokens + 2


class Where(Enum):
    """Where a walk ended."""

    FOUND = "found"
    """On the tree: what lies below is the draft."""
    PENDING = "pending"
    """At the end of what has been published; a later publication may continue from here."""
    OFF = "off"
    """The text left the tree: this outcome was not guessed."""
    UNKNOWN = "unknown"
    """There is no tree for this request."""


@dataclass(slots=True)
class Walk:
    """The result of walking a text down its tree."""

    where: Where
    row: int = -1
    """The row the walk ended on (``FOUND``), else the trunk."""
    offset: int = 0
    """How many tokens of that row the text covers."""


class Below(NamedTuple):
    """What lies below a text (:meth:`SpeculationCache.look_up`)."""

    where: Where
    row: int
    """As in :class:`Walk`."""
    drafted: list[int]
    """``FOUND``: all that the row holds after the text, an end token included."""
    ended: bool
    """``FOUND``: the row ends with the last of them."""
    chances: list[float]
    """``FOUND``: for each the chance that the target accepts it if it accepts those before."""


NOWHERE = Below(Where.UNKNOWN, -1, [], False, [])


@dataclass(slots=True)
class Tree:
    """One request's tree, good for all texts that start with its first ``base`` tokens."""

    base: int
    """Length of the confirmed text when the tree was planted; trunk token 0 has this position."""
    trunk: int
    """Row of the trunk."""
    complete: bool = False
    """No more forks will come for this tree."""
    forks: list[tuple[Int64Array, Int32Array | Int64Array]] = field(default_factory=list)
    """Batches of ``(key, row)``, where key is ``fork_key(k, t*)``; each array ``[forks]``."""

    def fork_at(self, k: int, token: int) -> int:
        """The row forked after ``k`` trunk tokens with first token ``token``; -1 if none."""
        key = (k << 32) | token
        for keys, rows in self.forks:
            known = keys.tolist()  # for a few keys searching a list is faster than an array
            if key in known:
                return int(rows[known.index(key)])
        return -1

    def has(self, row: int) -> bool:
        """Whether the row is its trunk or one of its forks."""
        return row == self.trunk or any(
            row in rows[keys != _PRUNED].tolist() for keys, rows in self.forks
        )


_MANY = 48
"""From this many requests on, operations on arrays of all are faster than a loop over them."""
_MANY_PLANTED = 16
"""The same for planting."""
_PRUNED = -1
"""Replaces the key of a pruned fork."""


def fork_keys(k: Int32Array | Int64Array, tokens: Int32Array) -> Int64Array:
    """One int64 for each ``(k, t*)``."""
    return (k.astype(np.int64) << 32) | tokens


class SpeculationCache:
    """The trees of all requests over one matrix of rows.

    Args:
        max_rows: rows in all (trunks and forks of all requests).
        width: tokens a row can hold (:func:`row_width`).
    """

    def __init__(self, max_rows: int, width: int) -> None:
        self.tokens: Int32Array = np.zeros((max_rows, width), np.int32)
        self.length: Int32Array = np.zeros(max_rows, np.int32)
        self.start: Int32Array = np.zeros(max_rows, np.int32)
        """Position in the text of each row's token 0."""
        self.chance: Float32Array = np.zeros((max_rows, width), np.float32)
        """For each of ``tokens`` the chance that the target accepts it if it accepts those before;
        not for the first token of a fork, which is a guess."""
        self.ended = np.zeros(max_rows, np.bool_)
        self.trees: dict[int, Tree] = {}

    def clear(self) -> None:
        """Forget all trees."""
        self.trees.clear()

    def plant(
        self,
        handle: int,
        base: int,
        trunk: int,
        tokens: Int32Array,
        chances: Float32Array,
        ended: bool,
    ) -> Tree:
        """Start a request's next tree: the trunk goes on with ``tokens`` from position ``base``."""
        count = len(tokens)
        self.tokens[trunk, :count] = tokens
        self.chance[trunk, :count] = chances
        self.length[trunk] = count
        self.start[trunk] = base
        self.ended[trunk] = ended
        tree = self.trees[handle] = Tree(base, trunk)
        return tree

    def plant_all(
        self,
        handles: list[int],
        bases: list[int],
        trunks: list[int],
        counts: list[int],
        tokens: Int32Array,
        chances: Float32Array,
        ended: list[int],
    ) -> None:
        """Start the next trees of many requests (:meth:`plant`).

        Args:
            handles: the requests.
            bases: the first position of each one's trunk.
            trunks: the row of each trunk.
            counts: how many tokens each trunk has so far.
            tokens: ``[sum(counts)]``, these tokens, grouped by trunk.
            chances: ``[sum(counts)]``, their chances.
            ended: nonzero where the trunk ends with them.

        Raises:
            IndexError: a row does not exist, or is shorter than its tokens.
        """
        if len(handles) < _MANY_PLANTED:
            at = 0
            for handle, base, trunk, count, end in zip(
                handles, bases, trunks, counts, ended, strict=True
            ):
                to = at + count
                self.plant(handle, base, trunk, tokens[at:to], chances[at:to], bool(end))
                at = to
            return
        lengths = np.array(counts)
        self.length[trunks] = lengths
        self.start[trunks] = bases
        self.ended[trunks] = np.array(ended, np.bool_)
        first = np.cumsum(lengths) - lengths
        columns = np.arange(len(tokens)) - np.repeat(first, lengths)
        rows = np.repeat(trunks, lengths)
        self.tokens[rows, columns] = tokens
        self.chance[rows, columns] = chances
        for handle, base, trunk in zip(handles, bases, trunks, strict=True):
            self.trees[handle] = Tree(base, trunk)

    def add_forks(
        self,
        handles: list[int],
        counts: list[int],
        k: Int32Array,
        tokens: Int32Array,
        rows: Int32Array | Int64Array,
    ) -> None:
        """Add forks to trees; those of a tree that no longer exists are skipped.

        Args:
            handles: the requests.
            counts: how many forks each gets.
            k: ``[forks]``, after how many trunk tokens each fork starts, grouped by request.
            tokens: ``[forks]``, its first token.
            rows: ``[forks]``, its row.
        """
        self.tokens[rows, 0] = tokens
        self.length[rows] = 1
        self.ended[rows] = False
        keys = fork_keys(k, tokens)
        bases = []
        at = 0
        for handle, count in zip(handles, counts, strict=True):
            tree = self.trees.get(handle)
            bases.append(0 if tree is None else tree.base)
            if tree is not None and count:
                tree.forks.append((keys[at : at + count], rows[at : at + count]))
            at += count
        self.start[rows] = k + (bases[0] if len(bases) == 1 else np.repeat(bases, counts))

    def prune(self, handles: list[int], counts: list[int], rows: Int32Array) -> None:
        """Take forks off trees; those of a tree that no longer exists are skipped.

        Args:
            handles: the requests.
            counts: how many forks each loses.
            rows: ``[forks]``, their rows, grouped by request.
        """
        at = 0
        for handle, count in zip(handles, counts, strict=True):
            tree = self.trees.get(handle)
            if tree is not None:
                for keys, of in tree.forks:
                    keys[np.isin(of, rows[at : at + count])] = _PRUNED
            at += count

    def append(
        self, rows: Int32Array | Int64Array, tokens: Int32Array, chances: Float32Array
    ) -> None:
        """Each of ``rows`` (distinct) grows by its tokens.

        Args:
            rows: ``[n]``.
            tokens: ``[steps, n]``, or ``[n]`` for one step.
            chances: in the same shape, the chance that the target accepts each of them.

        Raises:
            IndexError: a row does not exist or is full.
        """
        at = self.length[rows]
        steps = 1
        if tokens.ndim == 2:
            steps = len(tokens)
            at = at + np.arange(steps)[:, None]
        self.tokens[rows, at] = tokens
        self.chance[rows, at] = chances
        self.length[rows] += steps

    def walk(self, handle: int, new_tokens: list[int]) -> Walk:
        """Walk a request's confirmed tokens from its tree's ``base`` on (``text[tree.base:]``)."""
        tree = self.trees.get(handle)
        if tree is None:
            return Walk(Where.UNKNOWN)
        where, row, offset, _ = self._walk(tree, new_tokens)
        return Walk(where, row, offset)

    def _walk(self, tree: Tree, new_tokens: list[int]) -> tuple[Where, int, int, list[int]]:
        """What a :class:`Walk` holds, and the tokens of its row."""
        trunk = self.row_tokens(tree.trunk)
        k = _common_prefix(trunk, new_tokens)
        if k == len(new_tokens):
            return Where.FOUND, tree.trunk, k, trunk
        row = tree.fork_at(k, new_tokens[k])
        if row < 0:
            still_open = not tree.complete or (k == len(trunk) and not self.ended[tree.trunk])
            return Where.PENDING if still_open else Where.OFF, tree.trunk, k, trunk
        rest = new_tokens[k:]
        branch = self.row_tokens(row)
        matched = _common_prefix(branch, rest)
        if matched == len(rest):
            return Where.FOUND, row, matched, branch
        still_open = matched == len(branch) and not self.ended[row]
        return Where.PENDING if still_open else Where.OFF, tree.trunk, k, trunk

    def look_up(self, handles: list[int], texts: list[list[int]]) -> list[Below]:
        """Walk the texts of several requests, and read what lies below.

        Args:
            handles: the requests.
            texts: each one's confirmed tokens from its tree's ``base`` on, as for :meth:`walk`.

        Returns:
            For each the result of :meth:`walk`, with the tokens found.
        """
        if len(handles) >= _MANY:
            return self.look_up_many(handles, texts)
        found: list[Below] = []
        for handle, text in zip(handles, texts, strict=True):
            tree = self.trees.get(handle)
            if tree is None:
                found.append(NOWHERE)
                continue
            where, row, offset, tokens = self._walk(tree, text)
            if where is Where.FOUND:
                chances = self.chance[row, offset : len(tokens)].tolist()
                ended = bool(self.ended[row])
                found.append(Below(where, row, tokens[offset:], ended, chances))
            else:
                found.append(Below(where, row, [], False, []))
        return found

    def look_up_many(self, handles: list[int], texts: list[list[int]]) -> list[Below]:
        """The same as :meth:`look_up`, by operations on arrays that hold all requests."""
        found = [NOWHERE] * len(handles)
        known = [i for i, handle in enumerate(handles) if handle in self.trees]
        if not known:
            return found
        trees = [self.trees[handles[i]] for i in known]
        sizes = np.array([len(texts[i]) for i in known])
        new = np.full((len(known), int(sizes.max()) + 1), -1, np.int32)
        flat = [token for i in known for token in texts[i]]
        new[np.arange(new.shape[1]) < sizes[:, None]] = flat

        # Down the trunks and, where a text leaves its trunk, down the fork that begins there.
        trunks = np.array([tree.trunk for tree in trees])
        kept = self._agree(trunks, new, sizes)
        left = np.flatnonzero(kept < sizes)
        k = kept[left]
        rows, offsets = trunks.copy(), kept.copy()
        forks = _forks_at([trees[i] for i in left], fork_keys(k, new[left, k]))
        at_fork, fork_rows = left[forks >= 0], forks[forks >= 0]
        shift = kept[at_fork][:, None] + np.arange(new.shape[1])
        rests = np.take_along_axis(new[at_fork], np.minimum(shift, new.shape[1] - 1), axis=1)
        rows[at_fork] = fork_rows
        offsets[at_fork] = self._agree(fork_rows, rests, sizes[at_fork] - kept[at_fork])

        lengths, ended = self.length[rows], self.ended[rows]
        goal = sizes.copy()
        goal[at_fork] -= kept[at_fork]
        complete = offsets == goal
        # At the end of a row that still grows; or where a fork may still be made.
        still_open = (offsets == lengths) & ~ended
        no_fork = left[forks < 0]
        complete[no_fork] = False
        more_to_come = np.array([not tree.complete for tree in trees])
        still_open[no_fork] |= more_to_come[no_fork]
        for i, trunk, row, tokens, chances, offset, length, end, hit, pending in zip(
            known,
            trunks.tolist(),
            rows.tolist(),
            self.tokens[rows].tolist(),
            self.chance[rows].tolist(),
            offsets.tolist(),
            lengths.tolist(),
            ended.tolist(),
            complete.tolist(),
            still_open.tolist(),
            strict=True,
        ):
            if hit:
                below = tokens[offset:length], end, chances[offset:length]
                found[i] = Below(Where.FOUND, row, *below)
            else:
                where = Where.PENDING if pending else Where.OFF
                found[i] = Below(where, trunk, [], False, [])
        return found

    def _agree(self, rows: Int64Array, texts: Int32Array, sizes: Int64Array) -> Int64Array:
        """How many leading tokens of each text (``[n, width]``, of which the first ``size``
        count) equal those of its row; ``[n]``."""
        width = min(texts.shape[1], self.tokens.shape[1])
        known = np.minimum(sizes, self.length[rows])
        same = np.zeros((len(rows), width + 1), np.bool_)
        same[:, :width] = self.tokens[rows, :width] == texts[:, :width]
        same[:, :width] &= np.arange(width) < known[:, None]
        return same.argmin(axis=1)

    def row_tokens(self, row: int) -> list[int]:
        """The tokens of a row."""
        tokens: list[int] = self.tokens[row, : self.length[row]].tolist()
        return tokens


def _forks_at(trees: list[Tree], keys: Int64Array) -> Int64Array:
    """For each tree the row of its fork with that key (:meth:`Tree.fork_at`), or -1; ``[n]``."""
    found = np.full(len(trees), -1, np.int64)
    batches = [(i, batch) for i, tree in enumerate(trees) for batch in tree.forks]
    if batches:
        counts = [len(rows) for _, (_, rows) in batches]
        owners = np.repeat([i for i, _ in batches], counts)
        have = np.concatenate([of for _, (of, _) in batches])
        rows = np.concatenate([rows for _, (_, rows) in batches])
        # Backwards: of two forks with one key the first one counts.
        hits = np.flatnonzero(have == keys[owners])[::-1]
        found[owners[hits]] = rows[hits]
    return found


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens agree."""
    if a[: len(b)] == b:
        return len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
