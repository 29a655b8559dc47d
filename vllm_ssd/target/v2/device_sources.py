"""What drafted tokens were sampled from (q'), as arrays that the device reads.

Beside each token of :class:`.device_trees.DeviceTrees` lie the tokens it was sampled from, their
probabilities, and a checksum over both, the token and its position. Nothing is locked here either:
a device that reads while the host writes finds a checksum that does not fit, and takes the token as
certain. That is exact for a sampled token as well (:mod:`vllm_ssd.target.v1.handover`), since when
the host writes does not depend on what was drawn.

A checksum also fits if, after the token was read, the row was used for another text, in which the
same token was drawn in that place from something else. Which token it is must not decide that, so
each row has a count of its lives: it has to be the same before its tokens and after their
checksums are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_ssd.core.arrays import Float32Array, Int32Array, Int64Array
from vllm_ssd.core.distributions import ROUNDING
from vllm_ssd.target.v2.shared import shared
from vllm_ssd.wire.messages import MAX_ROWS


class _Factors(NamedTuple):
    """Of the checksum: odd numbers, any. NumPy's or torch's int64, which wrap alike."""

    tokens: Any
    """``[N]``."""
    probabilities: Any
    """``[N]``."""
    support: int
    drafted: int
    position: int
    one: int


class DeviceSources:
    """The arrays. Known by position in the text, as in :class:`Distributions`.

    Args:
        width: tokens a row can hold.
        most: N, the most tokens of a distribution.
        device: which reads the arrays.
    """

    def __init__(self, width: int, most: int, device: torch.device) -> None:
        self.width, self.most = width, most
        self.empty = True
        """Whether all tokens that ever came were certain: then there is nothing to forget."""
        self._host_tokens: Int32Array
        self._host_tokens, self._tokens = shared((MAX_ROWS, width, most), torch.int32, device)
        self._host_probabilities: Float32Array
        self._host_probabilities, self._probabilities = shared(
            (MAX_ROWS, width, most), torch.float32, device
        )
        self._host_support: Int32Array
        self._host_support, self._support = shared((MAX_ROWS, width), torch.int32, device)
        self._host_sum: Int64Array
        self._host_sum, self._sum = shared((MAX_ROWS, width), torch.int64, device)
        """The checksums; 0: the token was certain."""
        self._host_lives: Int32Array
        self._host_lives, self._lives = shared(MAX_ROWS, torch.int32, device)
        """How often each row has begun anew, times 2; odd while that is done."""
        numbers = np.random.default_rng(0).integers(-(2**62), 2**62, 2 * most + 4) | 1
        scalars: list[int] = numbers[2 * most :].tolist()
        self._factors = _Factors(numbers[:most], numbers[most : 2 * most], *scalars)
        on_device = torch.from_numpy(numbers).to(device)
        self._device_factors = self._factors._replace(
            tokens=on_device[:most], probabilities=on_device[most : 2 * most]
        )
        self._counting = torch.arange(most, device=device)

    # ---- what the host writes

    @contextmanager
    def rewriting(self, rows: Int32Array) -> Iterator[None]:
        """These rows get other tokens meanwhile; of numbers outside the cache nothing is noted."""
        rows = rows[(rows >= 0) & (rows < MAX_ROWS)]
        self._host_lives[rows] += 1
        try:
            yield
        finally:
            self._host_lives[rows] += 1

    def forget(self, rows: Int32Array | Int64Array | list[int]) -> None:
        """Rows begin anew: what they held of another text counts no more."""
        if not self.empty:
            self._host_sum[rows] = 0

    def certain(self, rows: Int32Array | Int64Array, positions: Int32Array) -> None:
        """Tokens will be there that were chosen without chance; see :class:`Distributions`."""
        if not self.empty:
            self._host_sum[rows, positions % self.width] = 0

    def sampled(
        self,
        rows: Int32Array | Int64Array,
        positions: Int32Array,
        supports: Int32Array,
        tokens: Int32Array,
        probabilities: Float32Array,
        drafted: Int32Array,
    ) -> None:
        """Tokens will be there that were sampled; see :class:`Distributions`."""
        self.empty = False
        columns = positions % self.width
        held = np.arange(self.most) < supports[:, None]
        all_tokens = np.zeros(held.shape, np.int32)
        all_probabilities = np.zeros(held.shape, np.float32)
        all_tokens[held], all_probabilities[held] = tokens, probabilities
        self._host_sum[rows, columns] = 0
        self._host_tokens[rows, columns] = all_tokens
        self._host_probabilities[rows, columns] = all_probabilities
        self._host_support[rows, columns] = supports
        self._host_sum[rows, columns] = _checksum(
            self._factors,
            all_tokens.astype(np.int64),
            all_probabilities.view(np.int32).astype(np.int64),
            supports.astype(np.int64),
            drafted.astype(np.int64),
            positions.astype(np.int64),
        )

    # ---- what the device reads

    def lives(self, rows: torch.Tensor) -> torch.Tensor:
        """``[B]`` int32, to be read before the tokens of B rows that exist."""
        return self._lives[rows]

    def read(
        self,
        rows: torch.Tensor,
        lives: torch.Tensor,
        first: torch.Tensor,
        drafts: torch.Tensor,
        drafted: torch.Tensor,
        ahead: torch.Tensor,
    ) -> Sampled:
        """What the tokens of B proposals were sampled from.

        Args:
            rows: ``[B]``, the row that each was found in; any number where none was.
            lives: ``[B]``, of these rows before the tokens were read.
            first: ``[B]``, the position of each one's first token in its text.
            drafts: ``[B, K]`` int64, the tokens.
            drafted: ``[B]``, how many of them are in that row.
            ahead: ``[K]``, 0, 1, 2, ...
        """
        positions = first[:, None].long() + ahead
        rows = rows.clamp(0, MAX_ROWS - 1).long()
        at = rows[:, None] * self.width + positions % self.width
        tokens = self._tokens.view(-1, self.most)[at]
        probabilities = self._probabilities.view(-1, self.most)[at]
        support, found = self._support.view(-1)[at], self._sum.view(-1)[at]
        wanted = _checksum(
            self._device_factors,
            tokens.long(),
            probabilities.view(torch.int32).long(),
            support.long(),
            drafts,
            positions,
        )
        alive = (self._lives[rows] == lives) & (lives % 2 == 0)  # after all else is read
        held = self._counting < support[..., None]
        whole = (probabilities.sum(-1) - 1.0).abs() <= ROUNDING
        among = ((tokens == drafts[..., None]) & held).any(-1)
        is_sampled = (found == wanted) & (found != 0) & whole & among & alive[:, None]
        is_sampled &= ahead < drafted[:, None]
        # Places that are left over repeat the first one, of certain tokens all are the token.
        tokens = torch.where(held, tokens, tokens[..., :1]).long()
        tokens = torch.where(is_sampled[..., None], tokens, drafts[..., None])
        logs = torch.where(held, probabilities, probabilities[..., :1]).log()
        logs = logs.masked_fill(~is_sampled[..., None], 0.0)
        return Sampled(tokens, logs, is_sampled.sum(dim=1).int())


class Sampled(NamedTuple):
    """What B proposals were sampled from; a certain token was from itself alone."""

    tokens: torch.Tensor
    """``[B, K, N]`` int64; some may be there repeatedly, with the same probability."""
    logs: torch.Tensor
    """``[B, K, N]`` float32, the logarithms of their probabilities."""
    count: torch.Tensor
    """``[B]`` int32, how many tokens of each were sampled."""


def certain(drafts: torch.Tensor, most: int) -> Sampled:
    """The same of tokens ``[B, K]`` that were chosen without chance."""
    tokens = drafts[..., None].expand(*drafts.shape, most)
    logs = torch.zeros(tokens.shape, dtype=torch.float32, device=drafts.device)
    return Sampled(tokens, logs, torch.zeros_like(drafts[:, 0], dtype=torch.int32))


def _checksum(
    factors: _Factors, tokens: Any, probabilities: Any, support: Any, drafted: Any, position: Any
) -> Any:
    """NumPy or torch int64: what lies beside a token, and what it was when that was written.

    Args:
        factors: as NumPy's or torch's numbers.
        tokens: ``[..., N]``.
        probabilities: ``[..., N]``, their bits.
        support: ``[...]``.
        drafted: ``[...]``.
        position: ``[...]``.
    """
    return (
        (tokens * factors.tokens).sum(-1)
        + (probabilities * factors.probabilities).sum(-1)
        + support * factors.support
        + drafted * factors.drafted
        + position * factors.position
        + factors.one
    )
