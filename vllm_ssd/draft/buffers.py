"""The runner's persistent buffers, which carry a forward's inputs.

On CPU they are filled by numpy, in place: on so few numbers its operations take a fraction of the
time of torch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_ssd.core.arrays import Int32Array, Int64Array
from vllm_ssd.draft.graphs import Padded
from vllm_ssd.draft.inputs import HostInputs
from vllm_ssd.draft.model import BlockChanges, Sequences


class Buffers(NamedTuple):
    """The persistent buffers of the runner, or what a forward uses of them."""

    ids: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    lens: torch.Tensor
    tables: torch.Tensor
    slots: torch.Tensor

    def cut(self, padded: Padded) -> Buffers:
        """What a forward of these sizes uses."""
        tokens, sequences = padded.tokens, padded.sequences
        return Buffers(
            self.ids[:tokens],
            self.positions[:tokens],
            self.starts[: sequences + 1],
            self.lens[:sequences],
            self.tables[:sequences],
            self.slots[:tokens],
        )


def runner_buffers(runner: Any) -> Buffers:
    """All of them, in full."""
    table = runner.input_batch.block_table[0]
    return Buffers(
        runner.input_ids.gpu,
        runner.positions,
        runner.query_start_loc.gpu,
        runner.seq_lens,
        table.block_table.gpu,
        table.slot_mapping.gpu,
    )


class HostBuffers(NamedTuple):
    """The runner's persistent buffers and the rows' block tables, in the host's own memory."""

    ids: Int32Array
    positions: Int64Array
    starts: Int32Array
    lens: Int32Array
    tables: Int32Array
    slots: Int64Array
    row_tables: Int32Array
    """``[max_rows, blocks]``, the block table of each row, whatever the batch."""


def fill_on_host(
    buffers: HostBuffers,
    changes: BlockChanges,
    sequences: Sequences,
    block_size: int,
    last_token: int,
) -> HostInputs:
    """Update the rows' block tables and fill all buffers for one forward, without padding.

    Args:
        buffers: filled from the start.
        changes: of the block tables.
        sequences: of the forward.
        block_size: tokens per block.
        last_token: the largest id that the embedding has.

    Returns:
        Views of the buffers, as long as the batch.
    """
    count, total = len(sequences.rows), len(sequences.tokens)
    row_tables = buffers.row_tables
    if len(changes.forks):
        row_tables[changes.forks, : changes.shared] = row_tables[changes.trunks, : changes.shared]
    if len(changes.rows):
        row_tables[changes.rows, changes.columns] = changes.blocks
    starts, lens = buffers.starts[: count + 1], buffers.lens[:count]
    starts[0] = 0
    np.cumsum(sequences.query_lens, out=starts[1:])
    positions = sequences.positions
    np.add(positions if total == count else positions[starts[1:] - 1], 1, out=lens)
    used = int(lens.max() - 1) // block_size + 1
    tables = buffers.tables[:count]
    tables[:, :used] = row_tables[sequences.rows, :used]
    sequence = np.arange(count)
    if total > count:
        sequence = np.repeat(sequence, sequences.query_lens)
    np.minimum(sequences.tokens, last_token, out=buffers.ids[:total])
    buffers.positions[:total] = positions
    page = positions // block_size
    # block * size + position % size, with fewer operations
    buffers.slots[:total] = (tables[sequence, page] - page) * block_size + positions
    return HostInputs(starts, lens)
