"""Prolongs proposals by what followed the same tokens earlier in a request's own text."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from vllm_ssd.core.ngram import continuation
from vllm_ssd.core.stats import Stats
from vllm_ssd.target.lookup import Batch, LookUp

WINDOW = 8192
"""So many of a text's last tokens are searched (5 to 25 us)."""
TOTAL = 16 * WINDOW
"""So many tokens of all texts together."""


def prolong(look_ups: Sequence[LookUp], counts: Sequence[int], batch: Batch, stats: Stats) -> None:
    """Prolong proposals.

    Args:
        look_ups: answered; all that was found for them is proposed, which may be nothing.
        counts: by how many tokens each may be prolonged.
        batch: the verification.
        stats: counters to keep.
    """
    began = time.perf_counter()
    window = min(WINDOW, TOTAL // len(look_ups))
    for each, count in zip(look_ups, counts, strict=True):
        text = batch.texts[each.row, max(0, each.length - window) : each.length]
        if each.request.proposed:
            text = np.append(text, np.array(each.request.proposed, np.int32))
        stats.ngram_proposals += each.prolong(continuation(text, count)) > 0
    stats.ngram_seconds += time.perf_counter() - began
