"""Look-up on the device: for the whole batch at once, what lies below each request's text.

The same walk as :meth:`vllm_ssd.core.tree.SpeculationCache.walk`, as tensor operations whose shapes
depend on the number of requests alone. No value is needed on the host: nothing synchronises, and a
CUDA graph can hold them.

The order of reading mirrors the writer's order of writing: roots and keys before the rows they lead
to, a row's end before its length, and that before its tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_ssd.core.tree import Where
from vllm_ssd.target.v2.device_trees import DeviceTrees, pack_forks, unpack_roots

WHERE = (Where.UNKNOWN, Where.OFF, Where.PENDING, Where.FOUND)
"""What the numbers in :attr:`Found.where` stand for."""
_OFF, _FOUND = 1, 3


class Found(NamedTuple):
    """The result of :func:`look_up` for B requests."""

    drafts: torch.Tensor
    """``[B, K]`` int64: the tokens found, filled up with the last token of the text."""
    drafted: torch.Tensor
    """``[B]`` int32: how many of them were found."""
    ended: torch.Tensor
    """``[B]`` int32: 1 where the walk ended on a row that ends there or below; nothing follows."""
    where: torch.Tensor
    """``[B]`` int32: where each walk ended, an index of :data:`WHERE`."""
    row: torch.Tensor
    """``[B]`` int32: on which row, if tokens were found."""
    life: torch.Tensor
    """``[B]`` int32: which life that row had (:meth:`.DeviceSources.lives`), if any is counted."""


class _Rows(NamedTuple):
    """B rows as they were when they were read."""

    life: torch.Tensor
    """``[B]``."""
    length: torch.Tensor
    """``[B]``."""
    ended: torch.Tensor
    """``[B]`` int32: 1 where the last token ends the row."""
    tokens: torch.Tensor
    """``[B, width]``."""


def look_up(
    trees: DeviceTrees,
    texts: torch.Tensor,
    lengths: torch.Tensor,
    last_sampled: torch.Tensor,
    slots: torch.Tensor,
    num_sampled: torch.Tensor,
) -> Found:
    """Walk the texts of B requests down their trees and take K tokens from where they end.

    An end token is not among them: verification yields it without that, as the bonus token.

    Args:
        trees: the speculation cache.
        texts: ``[slots, max_model_len]`` int32, each slot's text.
        lengths: ``[slots]`` int32, its length, with the tokens just sampled.
        last_sampled: ``[slots]`` or ``[slots, 1]`` int64, its last token.
        slots: ``[B]`` int64.
        num_sampled: ``[B]`` int32; 0 while a prompt is computed, for which nothing is looked up.
    """
    width = trees.width
    columns, ahead = trees.counting[:width], trees.counting[: trees.depth]
    base, complete, trunk_row = unpack_roots(trees.roots[slots])
    new = lengths[slots] - base  # tokens since the tree was planted
    known = (base >= 0) & (num_sampled > 0)
    positions = (base[:, None] + trees.counting).clamp(0, texts.shape[1] - 1)
    text = texts[slots[:, None], positions]

    # Down the trunk.
    trunk = _read(trees, trunk_row)
    k = _agree(trunk, text[:, :width], new, columns)
    on_trunk = k == new

    # Where the text leaves it, down the fork that begins there.
    key = pack_forks(slots, k, text.gather(1, k[:, None])[:, 0])
    forked, fork_row = (trees.forks == key[:, None]).max(dim=1)
    fork = _read(trees, fork_row)
    rest = text.gather(1, k[:, None] + columns)
    matched = _agree(fork, rest, new - k, columns)
    on_fork = forked & (matched == new - k)

    # What lies below, without the token that ends the row.
    found = known & (on_trunk | on_fork)
    ended = torch.where(on_trunk, trunk.ended, fork.ended) * found
    offset = torch.where(on_trunk, k, matched)
    left = torch.where(on_trunk, trunk.length, fork.length) - ended - offset
    drafted = left.clamp(0, trees.depth) * found
    tokens = torch.where(on_trunk[:, None], trunk.tokens, fork.tokens)
    below = tokens.gather(1, (offset[:, None] + ahead).clamp(max=width - 1))
    last = last_sampled.view(-1)[slots][:, None]
    drafts = torch.where(ahead < drafted[:, None], below, last).clamp(0, trees.vocab_size - 1)

    # A walk that ended early may go on later: a row still grows, or a fork is still to come.
    trunk_grows = (k == trunk.length) & (trunk.ended == 0)
    fork_grows = (matched == fork.length) & (fork.ended == 0)
    pending = torch.where(forked, fork_grows, trunk_grows | ~complete)
    where = (_OFF + pending.int()).masked_fill(on_trunk | on_fork, _FOUND) * known
    row = torch.where(on_trunk, trunk_row, fork_row)
    life = torch.where(on_trunk, trunk.life, fork.life)
    return Found(drafts, drafted.int(), ended.int(), where.int(), row.int(), life.int())


def _read(trees: DeviceTrees, rows: torch.Tensor) -> _Rows:
    life = torch.zeros_like(rows) if trees.sources is None else trees.sources.lives(rows)
    ended = trees.ended[rows].int()  # before the length, else it might be of a later token
    length = trees.length[rows]  # before the tokens that it counts
    return _Rows(life, length, ended, trees.tokens[rows])


def _agree(
    rows: _Rows, text: torch.Tensor, size: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """How many leading tokens of each text, of which the first ``size`` count, equal its row's.

    Args:
        rows: B of them.
        text: ``[B, width]``.
        size: ``[B]``; negative counts as 0.
        columns: ``[width]``, 0, 1, 2, ...

    Returns:
        ``[B]`` int64, from 0 to ``width``.
    """
    same = (rows.tokens == text) & (columns < torch.minimum(rows.length, size)[:, None])
    return columns.masked_fill(same, len(columns)).amin(dim=1)
