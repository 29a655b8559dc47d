"""The speculation cache as arrays that the device reads: what :mod:`.writer` writes and
:mod:`.look_up` reads.

The arrays are host memory. A GPU reads them through a mapping, without a copy, so it may read while
the host writes. Nothing is locked: *every* content of the arrays is safe to read. Row numbers,
lengths and tokens are bounded where they are used, so a torn read can only yield a miss, or a draft
that verification rejects. How rarely that happens is the writer's matter.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_ssd.core.arrays import BoolArray, Int32Array, Int64Array
from vllm_ssd.core.tree import row_width
from vllm_ssd.option_errors import MAX_SPECULATIVE_TOKENS
from vllm_ssd.target.v2.device_sources import DeviceSources
from vllm_ssd.target.v2.shared import shared
from vllm_ssd.wire.messages import MAX_ROWS

NOTHING = -1
"""In place of a root: the slot has no tree. In place of a fork's key: the row is no fork."""

_BASE_BITS, _COMPLETE_BITS, _ROW_MASK = 32, 16, (1 << 16) - 1
_SLOT_BITS, _K_BITS = 40, 32
assert MAX_ROWS <= _ROW_MASK
assert row_width(MAX_SPECULATIVE_TOKENS) < 1 << (_SLOT_BITS - _K_BITS)


class DeviceTrees:
    """The arrays. Each has a view of the host (NumPy) and one of the device (torch), of one memory.

    A word that says where something is, a root or a fork's key, is 64 bits wide and is stored at
    once, so its parts always belong together.

    Args:
        max_slots: request slots of the model runner.
        num_speculative_tokens: K.
        vocab_size: the target's; no id from there on is ever proposed.
        device: which reads the arrays.
        sampled_from: the most tokens that a token is sampled from; 0 if none are sampled.

    Raises:
        RuntimeError: the device cannot read host memory.
    """

    def __init__(
        self,
        max_slots: int,
        num_speculative_tokens: int,
        vocab_size: int,
        device: torch.device,
        sampled_from: int = 0,
    ) -> None:
        self.depth = num_speculative_tokens
        self.width = row_width(num_speculative_tokens)
        self.vocab_size = vocab_size
        self.host_roots: Int64Array
        self.host_roots, self.roots = shared(max_slots, torch.int64, device)
        """``[slots]``, the tree of each (:func:`pack_root`)."""
        self.host_forks: Int64Array
        self.host_forks, self.forks = shared(MAX_ROWS, torch.int64, device)
        """``[rows]``, of which tree each is a fork, and where (:func:`pack_forks`)."""
        self.host_tokens: Int32Array
        self.host_tokens, self.tokens = shared((MAX_ROWS, self.width), torch.int32, device)
        """``[rows, width]``."""
        self.host_length: Int32Array
        self.host_length, self.length = shared(MAX_ROWS, torch.int32, device)
        """``[rows]``, how many of its tokens a row has."""
        self.host_ended: BoolArray
        self.host_ended, self.ended = shared(MAX_ROWS, torch.bool, device)
        """``[rows]``, whether the last of them ends the row."""
        self.sources: DeviceSources | None = None
        """What the tokens were sampled from, if any are."""
        if sampled_from:
            self.sources = DeviceSources(self.width, sampled_from, device)
        self.clear()
        self.counting = torch.arange(2 * self.width, device=device)
        """0, 1, 2, ...: made once, so that a look-up makes no constants."""

    def clear(self) -> None:
        """Forget all trees."""
        self.host_roots[:] = NOTHING
        self.host_forks[:] = NOTHING


def pack_root(base: int, complete: bool, trunk: int) -> int:
    """The word for a tree: planted at position ``base``, its trunk in row ``trunk``, complete if
    no more forks will come."""
    return (base << _BASE_BITS) | (complete << _COMPLETE_BITS) | trunk


def unpack_roots(roots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reverse for B slots: base, complete (bool) and trunk, each ``[B]``.

    Of :data:`NOTHING` the base is -1. A trunk is bounded to rows that exist.
    """
    complete = (roots >> _COMPLETE_BITS) & 1 != 0
    return roots >> _BASE_BITS, complete, (roots & _ROW_MASK).clamp(max=MAX_ROWS - 1)


def pack_forks(slot: Any, k: Any, token: Any) -> Any:
    """The keys of forks: of the tree in ``slot``, after ``k`` trunk tokens, with first token
    ``token``.

    NumPy or torch int64; ``k`` from 0 to the width of a row.
    """
    return (slot << _SLOT_BITS) | (k << _K_BITS) | token
