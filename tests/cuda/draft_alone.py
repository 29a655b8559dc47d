"""The draft model alone, in a process of its own: its CUDA graphs, its waits, its steps' times."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.cuda.explained import explained
from tests.cuda.marks import Planned
from tests.cuda.syncs import counted

CONTEXT = 256
"""Tokens of text before those that are decoded."""
KV_BYTES = 256 << 20
CANDIDATES = 64
"""The most best tokens a forward returns."""
WARM_UP = 5
"""Steps at each number of rows that are not counted."""


@dataclass(kw_only=True)
class Alone:
    """What to bring up, and how many rows to decode."""

    planned: Planned
    rows: Sequence[int]
    steps: int
    limit_s: int


class Rows(NamedTuple):
    """Steps of so many rows."""

    seconds: float
    """The median, from one result to the next; launched ahead where the model can."""
    graph_steps: int
    """How many of them replayed a CUDA graph."""


class DraftFound(NamedTuple):
    """What the draft has shown."""

    graphs: str
    """vLLM's name of its mode of CUDA graphs."""
    captured: int
    """Graphs, at its start."""
    captured_later: int
    """While it decoded."""
    full_sizes: list[int]
    """Rows that there are graphs for which include the attention."""
    steps: int
    """For each number of rows."""
    by_rows: dict[int, Rows]
    syncs: Counter[str]
    """Where launches waited for the device."""


def decode(alone: Alone, tell: Callable[[Any], None]) -> DraftFound:
    """Bring it up as the draft process does and decode: what runs in its process.

    Args:
        alone: what to do.
        tell: takes what happens; there is nothing to tell.
    """
    with explained(alone.limit_s):
        return _measure(alone)


def _measure(alone: Alone) -> DraftFound:
    planned, setup = alone.planned, alone.planned.setup
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if planned.device is None:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        os.environ["OMP_NUM_THREADS"] = "1"
    elif planned.device:
        os.environ["CUDA_VISIBLE_DEVICES"] = planned.device
    from vllm.compilation.counter import compilation_counter
    from vllm.config import CUDAGraphMode

    from vllm_ssd.draft.vllm_model import VllmDraftModel
    from vllm_ssd.wire.packing import unpack

    model = VllmDraftModel(dict(setup.engine_args))
    model.load(setup.vocab_size, unpack(setup.draft_vocab) if setup.draft_vocab else None)
    kv_bytes = min(planned.kv_bytes or KV_BYTES, KV_BYTES)
    model.allocate(kv_bytes, min(setup.max_branches + 1, CANDIDATES))
    captured = compilation_counter.num_cudagraph_captured
    dispatcher = model._runner.cudagraph_dispatcher
    full = sorted(key.num_tokens for key in dispatcher.cudagraph_keys[CUDAGraphMode.FULL])
    syncs: Counter[str] = Counter()
    by_rows = {rows: _decode(model, rows, alone.steps, syncs) for rows in alone.rows}
    return DraftFound(
        str(model.config.compilation_config.cudagraph_mode),
        captured,
        compilation_counter.num_cudagraph_captured - captured,
        full,
        alone.steps,
        by_rows,
        syncs,
    )


def _decode(model: Any, rows: int, steps: int, syncs: Counter[str]) -> Rows:
    """Decode rows that share a text, as forks do, as often as asked for."""
    import numpy as np

    from vllm_ssd.draft.model import FROM_LAST_STEP, BlockChanges, Sequences

    shared = CONTEXT // model.block_size
    tables = np.tile(np.arange(1, shared + 2, dtype=np.int32), (rows, 1))
    tables[:, -1] = 1 + shared + np.arange(rows)
    every = np.arange(rows, dtype=np.int32)
    ones = np.ones(rows, np.int32)
    positions = np.full(rows, shared * model.block_size, np.int32)
    changes = BlockChanges.of_tables(every, tables)
    none = BlockChanges.of_tables(every[:0], tables[:0])
    tokens = np.arange(3, 3 + rows, dtype=np.int32)
    ahead = np.full(rows, FROM_LAST_STEP, np.int32) if model.lookahead else tokens

    again = Sequences(every, ones, ahead, positions)
    ticket = model.launch(changes, Sequences(every, ones, tokens, positions))
    for _ in range(WARM_UP):
        with counted() as places:
            behind = model.launch(none, again)
        ticket.result()
        ticket = behind
    syncs.update(places)  # of the last one: what comes only once is over by then
    replayed, ended = model.graph_steps, [time.perf_counter()]
    for _ in range(steps):
        behind = model.launch(none, again)
        ticket.result()
        ended.append(time.perf_counter())
        ticket = behind
    ticket.result()
    replayed = model.graph_steps - replayed
    times = [after - before for before, after in itertools.pairwise(ended)]
    return Rows(statistics.median(times), replayed)
