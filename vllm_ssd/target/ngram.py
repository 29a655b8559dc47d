"""Drafts from a request's own text: what followed the same tokens earlier in it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numba
import numpy as np
from vllm.v1.spec_decode.ngram_proposer import batch_propose_numba

from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.core.stats import Stats
from vllm_ssd.target.lookup import Batch, LookUp

SHORTEST, LONGEST = 2, 5
"""An n-gram of that many tokens must have come before, the longer the better."""
WINDOW = 8192
"""So many of a text's last tokens are searched (13 us)."""
_TOTAL = 32 * WINDOW
"""So many tokens of all texts together (0.3 ms)."""


class Ngrams:
    """vLLM's n-gram proposer on texts that go on with drafted tokens.

    Args:
        depth: K.
        stats: counters to keep.
    """

    def __init__(self, depth: int, stats: Stats) -> None:
        self._depth = depth
        self._stats = stats

    def compile(self) -> None:
        """Let Numba compile, which takes a second."""
        self._search(np.zeros((1, 1), np.int32), np.ones(1, np.int32))

    def prolong(self, look_ups: Sequence[LookUp], counts: Sequence[int], batch: Batch) -> None:
        """Prolong proposals.

        Args:
            look_ups: answered; all that was found for them is proposed, which may be nothing.
            counts: by how many tokens each may be prolonged.
            batch: the verification.
        """
        began = time.perf_counter()
        window = min(WINDOW, _TOTAL // len(look_ups), max(each.length for each in look_ups))
        texts = np.zeros((len(look_ups), window + self._depth), np.int32)
        lengths = np.zeros(len(look_ups), np.int32)
        for row, each in enumerate(look_ups):
            size = min(each.length, window)
            proposed = each.request.proposed
            lengths[row] = size + len(proposed)
            texts[row, :size] = batch.texts[each.row, each.length - size : each.length]
            texts[row, size : lengths[row]] = proposed
        found, sizes = self._search(texts, lengths)
        for each, count, tokens, size in zip(
            look_ups, counts, found.tolist(), sizes.tolist(), strict=True
        ):
            self._stats.ngram_proposals += each.prolong(tokens[: min(count, size)]) > 0
        self._stats.ngram_seconds += time.perf_counter() - began

    def _search(self, texts: Int32Array, lengths: Int32Array) -> tuple[Int32Array, Int32Array]:
        """What follows each text, ``[n, K]``, and how many tokens that is, ``[n]``."""
        rows = np.arange(len(texts))
        found = np.zeros((len(texts), self._depth), np.int32)
        sizes = np.zeros(len(texts), np.int32)
        threads = numba.get_num_threads()
        numba.set_num_threads(1)  # more would wait for each other on the target's cores
        batch_propose_numba(
            rows,
            lengths,
            texts,
            SHORTEST,
            LONGEST,
            np.iinfo(np.int32).max,  # how long a text may be; ``counts`` bounds that here
            self._depth,
            found,
            sizes,
        )
        numba.set_num_threads(threads)
        return found, sizes
