"""The buffers as numpy fills them on CPU."""

from __future__ import annotations

import numpy as np
import pytest

from tests.draft.test_inputs import MIXED, ints
from vllm_ssd.draft.buffers import HostBuffers, fill_on_host
from vllm_ssd.draft.model import BlockChanges, Sequences

BLOCK_SIZE = 32
LAST_TOKEN = 60
UNTOUCHED = -7


@pytest.fixture
def buffers() -> HostBuffers:
    def of(*shape: int, dtype: type = np.int32) -> np.ndarray:
        return np.full(shape, UNTOUCHED, dtype)

    row_tables = np.arange(10 * 4, dtype=np.int32).reshape(10, 4)
    positions, slots = of(8, dtype=np.int64), of(8, dtype=np.int64)
    return HostBuffers(of(8), positions, of(7), of(6), of(6, 4), slots, row_tables)


def none() -> BlockChanges:
    return BlockChanges.of_tables(ints(), np.zeros((0, 0), np.int32))


def test_decodes_and_a_chunk_are_laid_out_one_after_the_other(buffers: HostBuffers) -> None:
    host = fill_on_host(buffers, none(), MIXED, BLOCK_SIZE, LAST_TOKEN)
    assert host.starts.tolist() == [0, 1, 2, 5]
    assert host.lens.tolist() == [8, 1, 33]
    assert buffers.ids.tolist() == [50, 51, 60, 60, 60, *[UNTOUCHED] * 3]
    assert buffers.positions[:5].tolist() == MIXED.positions.tolist()
    # Rows 4, 9 and 2; the longest text has two blocks.
    assert buffers.tables[:3, :2].tolist() == [[16, 17], [36, 37], [8, 9]]
    slots = [16 * 32 + 7, 36 * 32, 8 * 32 + 30, 8 * 32 + 31, 9 * 32]
    assert buffers.slots.tolist() == [*slots, *[UNTOUCHED] * 3]


def test_a_batch_of_decodes_after_a_longer_one(buffers: HostBuffers) -> None:
    fill_on_host(buffers, none(), MIXED, BLOCK_SIZE, LAST_TOKEN)
    decodes = Sequences(ints(2, 4), ints(1, 1), ints(5, 6), ints(33, 8))
    host = fill_on_host(buffers, none(), decodes, BLOCK_SIZE, LAST_TOKEN)
    assert host.starts.tolist() == [0, 1, 2]
    assert host.lens.tolist() == [34, 9]
    assert buffers.slots[:2].tolist() == [9 * 32 + 1, 16 * 32 + 8]


def test_forks_take_over_their_trunks_table_before_entries_change(buffers: HostBuffers) -> None:
    changes = none()._replace(
        forks=ints(4, 9),
        trunks=ints(9, 4),  # in a ring: both are read before one is written
        shared=3,
        rows=ints(4, 9),
        columns=ints(1, 2),
        blocks=ints(77, 88),
    )
    fill_on_host(buffers, changes, MIXED, BLOCK_SIZE, LAST_TOKEN)
    assert buffers.row_tables[4].tolist() == [36, 77, 38, 19]
    assert buffers.row_tables[9].tolist() == [16, 17, 88, 39]
    assert buffers.slots[0] == 36 * 32 + 7
