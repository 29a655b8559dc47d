"""Brings a draft model up: vLLM's worker, its KV cache, and the engine over both."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np

from vllm_ssd.draft.agreement import Offer
from vllm_ssd.draft.blocks import KVBlocks
from vllm_ssd.draft.engine import DraftEngine
from vllm_ssd.draft.model import BlockChanges, DraftModel, Sequences
from vllm_ssd.draft.rows import Rows
from vllm_ssd.draft.vllm_model import VllmDraftModel
from vllm_ssd.wire.messages import Setup
from vllm_ssd.wire.packing import unpack

_MAX_CANDIDATES = 64
_BUSY_CHUNK_FRACTION = 4
"""While others decode, a step prefills at most one in this many of the tokens it could."""


class BringUp:
    """A draft model on its way up.

    Args:
        setup: the model, and what it must be able to do.
        tell: called with what it is doing.
        vocabulary: a hash of its tokenizer's vocabulary; empty if that was compared already.

    Raises:
        Exception: whatever vLLM finds wrong.
    """

    def __init__(self, setup: Setup, tell: Callable[[str], None], vocabulary: str = "") -> None:
        self._setup = setup
        self._tell = tell
        self._vocabulary = vocabulary
        self._draft_vocab = unpack(setup.draft_vocab) if setup.draft_vocab else None
        self._loaded = False
        tell("reads the model's configuration")
        self._model = VllmDraftModel(dict(setup.engine_args))
        if setup.load_early:
            self._load()
            if not setup.engine_args["enforce_eager"]:
                tell("compiles the model")
                self._model.compile()

    def _load(self) -> None:
        self._tell("loads the weights")
        self._model.load(self._setup.vocab_size, self._draft_vocab)
        self._loaded = True

    def allocate(
        self, kv_cache_memory_bytes: int, interrupted: Callable[[], bool]
    ) -> tuple[DraftEngine, Offer]:
        """Load the weights, if that has not been done, and allocate the KV cache.

        Args:
            kv_cache_memory_bytes: 0 for what vLLM finds.
            interrupted: whether a message from a target waits for the step under way.

        Raises:
            Exception: whatever vLLM finds wrong.
        """
        setup, model = self._setup, self._model
        if not self._loaded:
            self._load()
        self._tell("allocates its KV cache and warms up")
        choices = setup.vocab_size if self._draft_vocab is None else len(self._draft_vocab)
        candidates = min(setup.max_branches + 1, _MAX_CANDIDATES, choices)
        sampled_from = min(setup.draft_top_n, choices)
        model.allocate(kv_cache_memory_bytes, candidates, sampled_from)
        try_step(model)
        max_rows = model.config.scheduler_config.max_num_seqs
        max_tokens = model.config.scheduler_config.max_num_batched_tokens
        engine = DraftEngine(
            model,
            Rows(max_rows, setup.num_speculative_tokens, candidates, sampled_from),
            KVBlocks(model.num_blocks, model.block_size, setup.enable_prefix_caching),
            prefill_chunk=max(1, (max_tokens - max_rows) // _BUSY_CHUNK_FRACTION),
            prefill_chunk_idle=max_tokens - max_rows,
            interrupted=interrupted,
        )
        # As in vLLM's own processes: no full collection looks at what the model has brought along.
        gc.collect()
        gc.freeze()
        offer = Offer(
            str(setup.engine_args["model"]),
            self._vocabulary,
            setup.vocab_size,
            setup.num_speculative_tokens,
            setup.max_branches,
            model.config.model_config.max_model_len,
            sampled_from,
        )
        return engine, offer


def try_step(model: DraftModel) -> None:
    """One step of one token: a kernel that cannot run here ends the start, not every later step.

    Its KV goes to vLLM's null block, which no text has.

    Raises:
        Exception: whatever the step raises.
    """
    zero = np.zeros(1, np.int32)
    changes = BlockChanges.of_tables(zero, zero[None])
    model.launch(changes, Sequences(zero, np.ones(1, np.int32), zero, zero)).result()
