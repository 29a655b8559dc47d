"""The integers of one forward: laid out on the host, sent to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.draft.graphs import Padded
from vllm_ssd.draft.model import FROM_LAST_STEP, BlockChanges, Sequences


class HostInputs(NamedTuple):
    """The attention's metadata of a forward, on the host."""

    starts: Int32Array
    """``[sequences + 1]``, where each sequence's query tokens start; padding is empty."""
    lens: Int32Array
    """``[sequences]``, texts including their query tokens; 0 for padding."""


def host_inputs(sequences: Sequences, padded: Padded) -> HostInputs:
    """Where the query tokens start and how long the texts are, padded."""
    count, total = len(sequences.query_lens), len(sequences.tokens)
    starts = np.zeros(padded.sequences + 1, np.int32)
    np.cumsum(sequences.query_lens, out=starts[1 : count + 1])
    starts[count + 1 :] = total
    lens = np.zeros(padded.sequences, np.int32)
    np.add(sequences.positions[starts[1 : count + 1] - 1], 1, out=lens[:count])
    return HostInputs(starts, lens)


class DeviceInputs(NamedTuple):
    """All integers of a step on the device, int32, in the shapes they have on the host."""

    tokens: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    lens: torch.Tensor
    rows: torch.Tensor
    forks: torch.Tensor
    trunks: torch.Tensor
    changed_rows: torch.Tensor
    changed_columns: torch.Tensor
    changed_blocks: torch.Tensor


def send(
    changes: BlockChanges, sequences: Sequences, host: HostInputs, device: torch.device
) -> DeviceInputs:
    """Bring a step's integers to the device in one copy; on CPU they stay where they are."""
    arrays = (
        sequences.tokens,
        sequences.positions,
        host.starts,
        host.lens,
        sequences.rows,
        changes.forks,
        changes.trunks,
        changes.rows,
        changes.columns,
        changes.blocks,
    )
    if device.type == "cpu":
        return DeviceInputs(*map(torch.from_numpy, arrays))
    from vllm.utils.torch_utils import async_tensor_h2d

    # From pinned memory, which is not reused before the copy is done.
    sent = async_tensor_h2d(join(arrays), device=device)
    return DeviceInputs(*cut(sent, [array.shape for array in arrays]))


def join(arrays: Sequence[Int32Array]) -> Int32Array:
    """All elements of all arrays, one after the other."""
    return np.concatenate([array.ravel() for array in arrays])


def cut(joined: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Views of what :func:`join` has joined, in their shapes."""
    parts = joined.split([int(np.prod(shape)) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def after_last_step(
    tokens: torch.Tensor, rows: torch.Tensor, next_tokens: torch.Tensor
) -> torch.Tensor:
    """The tokens to feed, with :data:`FROM_LAST_STEP` replaced by what the step before chose.

    Args:
        tokens: ``[n]``, one for each sequence; may be :data:`FROM_LAST_STEP`.
        rows: ``[n]``, the rows of the sequences.
        next_tokens: ``[max_rows]``, the next token of each row's last forward.
    """
    return torch.where(tokens == FROM_LAST_STEP, next_tokens[rows], tokens)


def sequence_of_tokens(starts: torch.Tensor, index: torch.Tensor, total: int) -> torch.Tensor:
    """Which sequence each query token belongs to, ``[total]``.

    Args:
        starts: ``[n + 1]``, where each sequence's query tokens start.
        index: ``[n]``, the numbers from 0.
        total: how many tokens there are.
    """
    if len(index) == total:
        return index
    return torch.repeat_interleave(index, starts.diff(), output_size=total)


def fill_slots(
    slots: torch.Tensor,
    tables: torch.Tensor,
    sequence: torch.Tensor,
    positions: torch.Tensor,
    block_size: int,
) -> None:
    """Compute where the KV of each query token goes.

    Args:
        slots: ``[T]`` int64, filled.
        tables: ``[n, blocks]``, the block tables of the batch.
        sequence: ``[T]``, the sequence of each token.
        positions: ``[T]`` int64, each token's position in its text.
        block_size: tokens per block.
    """
    page = positions // block_size
    # block * size + position % size, with fewer operations
    torch.add(positions, tables[sequence, page] - page, alpha=block_size, out=slots)
