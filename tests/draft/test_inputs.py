"""The inputs of a forward: laid out on the host, computed on the device."""

from __future__ import annotations

import numpy as np
import torch

from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.draft.graphs import Padded
from vllm_ssd.draft.inputs import (
    after_last_step,
    cut,
    fill_slots,
    host_inputs,
    join,
    send,
    sequence_of_tokens,
)
from vllm_ssd.draft.model import FROM_LAST_STEP, BlockChanges, Sequences

MIXED = Sequences(
    rows=np.array([4, 9, 2], np.int32),
    query_lens=np.array([1, 1, 3], np.int32),
    tokens=np.array([50, 51, 60, 61, 62], np.int32),
    positions=np.array([7, 0, 30, 31, 32], np.int32),
)


def ints(*values: int) -> Int32Array:
    return np.array(values, np.int32)


def test_starts_and_lengths_of_a_batch() -> None:
    starts, lens = host_inputs(MIXED, Padded(tokens=5, sequences=3, attended=5))
    assert starts.tolist() == [0, 1, 2, 5]
    assert lens.tolist() == [8, 1, 33]


def test_sequences_of_padding_are_empty() -> None:
    starts, lens = host_inputs(MIXED, Padded(tokens=8, sequences=6, attended=8))
    assert starts.tolist() == [0, 1, 2, 5, 5, 5, 5]
    assert lens.tolist() == [8, 1, 33, 0, 0, 0]


def test_what_is_sent_in_one_piece_is_what_arrives() -> None:
    arrays = [ints(1, 2, 3), np.zeros((0, 4), np.int32), np.arange(12).reshape(3, 4)[:, :2]]
    sent = torch.from_numpy(join([array.astype(np.int32) for array in arrays]))
    for array, arrived in zip(arrays, cut(sent, [a.shape for a in arrays]), strict=True):
        assert arrived.tolist() == array.tolist()
        assert arrived.numel() == 0 or arrived.untyped_storage().data_ptr() == sent.data_ptr()


def test_on_cpu_nothing_is_copied() -> None:
    nothing = ints()
    changes = BlockChanges.of_tables(nothing, np.zeros((0, 0), np.int32))
    host = host_inputs(MIXED, Padded(5, 3, 5))
    sent = send(changes, MIXED, host, torch.device("cpu"))
    assert sent.tokens.data_ptr() == MIXED.tokens.ctypes.data
    assert sent.lens.data_ptr() == host.lens.ctypes.data


def test_tokens_left_to_the_last_step_are_its_rows_choices() -> None:
    choices = torch.tensor([10, 11, 12, 13], dtype=torch.int32)
    tokens = torch.tensor([FROM_LAST_STEP, 7, FROM_LAST_STEP], dtype=torch.int32)
    rows = torch.tensor([3, 0, 1], dtype=torch.int32)
    assert after_last_step(tokens, rows, choices).tolist() == [13, 7, 11]


def test_slots_are_where_the_block_tables_say() -> None:
    tables = torch.tensor([[5, 6], [8, 9], [2, 3]], dtype=torch.int32)
    positions = torch.from_numpy(MIXED.positions).long()
    starts = torch.tensor([0, 1, 2, 5], dtype=torch.int32)
    sequence = sequence_of_tokens(starts, torch.arange(3), 5)
    assert sequence.tolist() == [0, 1, 2, 2, 2]
    slots = torch.full((5,), -7)
    fill_slots(slots, tables, sequence, positions, block_size=32)
    assert slots.tolist() == [5 * 32 + 7, 8 * 32, 2 * 32 + 30, 2 * 32 + 31, 3 * 32]


def test_a_batch_of_decodes_is_its_own_index() -> None:
    index = torch.arange(4)
    assert sequence_of_tokens(torch.arange(5), index, 4) is index
