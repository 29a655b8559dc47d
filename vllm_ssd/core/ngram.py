"""What followed the same tokens earlier in a text."""

from __future__ import annotations

import numpy as np

from vllm_ssd.core.arrays import Int32Array

SHORTEST, LONGEST = 2, 5
"""At least and at most so many of the last tokens must have come before."""


def continuation(text: Int32Array, most: int) -> list[int]:
    """What followed where most of a text's last tokens came before, the first time they did.

    The same as vLLM's n-gram proposer (``vllm/v1/spec_decode/ngram_proposer.py``) finds, as a few
    operations on arrays. That one needs Numba, and where Numba has been imported vLLM cannot start
    another CPU engine in the process (``register_kernels`` stumbles over llvmlite's objects).

    Args:
        text: ``[n]``, its tokens, at least one.
        most: how many tokens are wanted.
    """
    last = len(text) - 1
    ends, same = np.flatnonzero(text[:last] == text[last]), 1
    while same < LONGEST:
        longer = ends[ends >= same]
        longer = longer[text[longer - same] == text[last - same]]
        if not len(longer):
            break
        ends, same = longer, same + 1
    if same < SHORTEST or not len(ends):
        return []
    start = int(ends[0]) + 1
    found: list[int] = text[start : start + most].tolist()
    return found
