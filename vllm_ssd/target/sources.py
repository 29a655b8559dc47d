"""What proposed tokens were sampled from, read from the published trees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arrays import Float32Array, Int32Array, Int64Array
from vllm_ssd.core.tree import Where
from vllm_ssd.target.lookup import LookUp
from vllm_ssd.target.published import PublishedTrees


class Sources(NamedTuple):
    """The q' of m proposed tokens, on its support."""

    rows: Int64Array
    """``[m]``, their rows in the batch."""
    at: Int64Array
    """``[m]``, which token of its proposal each is."""
    supports: Int64Array
    """``[m]``, from how many tokens each was sampled; 0: it is certain."""
    tokens: Int32Array
    """``[sum(supports)]``, these tokens."""
    probabilities: Float32Array
    """``[sum(supports)]``, theirs."""


def read_sources(look_ups: Sequence[LookUp], published: PublishedTrees) -> Sources | None:
    """Read what tokens were sampled from, as soon as it is decided that they are proposed.

    Later may be too late: while the target waits for other requests, the draft may give the rows of
    these to other branches.

    Args:
        look_ups: answered; nothing was added yet to what was found.
        published: the trees they were found in.

    Returns:
        None if all tokens are certain.

    Raises:
        ValueError: the draft cannot have sampled a token from what it says.
    """
    distributions = published.distributions
    if distributions is None or distributions.empty:
        return None
    chosen = [
        each for each in look_ups if each.below.where is Where.FOUND and each.request.proposed
    ]
    if not chosen:
        return None
    counts = np.array([len(each.request.proposed) for each in chosen], np.int64)
    at = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    places = np.array([(each.row, each.below.row, each.length) for each in chosen], np.int64)
    rows, tree_rows, positions = np.repeat(places, counts, axis=0).T
    proposed = chain.from_iterable(each.request.proposed for each in chosen)
    drafted = np.fromiter(proposed, np.int64, len(at))
    found = published.distributions_of(tree_rows, positions + at, drafted)
    return Sources(rows, at, *found) if len(found[1]) else None
