"""What trunks hold at the positions being verified, read from rows and trees."""

from __future__ import annotations

import numpy as np

from vllm_ssd.core.arrays import BoolArray, Int32Array, Int64Array
from vllm_ssd.core.sampled_outcomes import Verifications
from vllm_ssd.core.setting_outcomes import choice_of
from vllm_ssd.core.tree import SpeculationCache
from vllm_ssd.draft.rows import Rows


def read_verifications(
    rows: Rows,
    cache: SpeculationCache,
    trunks: Int32Array,
    verified: Int64Array,
    known: Int64Array,
    positions: int,
    forced: bool,
) -> Verifications:
    """Read B trunks.

    Args:
        rows: all rows.
        cache: the trees.
        trunks: ``[B]``, the row of each trunk.
        verified: ``[B]``, n of each.
        known: ``[B]``, at how many positions the choices are known.
        positions: K + 1.
        forced: whether any of them may hold tokens that were forced on it, or is to take some.
    """
    sampled = rows.sampled
    setting, stated = sampled.setting[trunks], rows.stated[trunks, :positions]
    if not setting.any() and not forced:  # trunks hold first choices
        shape = stated.shape[:2]
        zeros, first = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        none = np.zeros(stated.shape, np.bool_)
        return Verifications(setting, verified, known, stated, first, zeros, zeros, none)
    choices = rows.choices[trunks, :positions]
    held = np.arange(positions) < cache.length[trunks][:, None]
    tokens = np.where(held, cache.tokens[trunks, :positions], rows.forced[trunks, :positions])
    choice = choice_of(choices, tokens)
    # What it does not hold yet, and is not forced on it, will be its first choice.
    choice[(tokens < 0) | (np.arange(positions) >= known[:, None])] = 0
    counts = sampled.weighed[trunks, :positions]
    weighed = np.zeros(choices.shape, np.bool_)
    if counts.any():
        possible = ~ends(choices, rows.stop[trunks])
        weighed = possible & (possible.cumsum(axis=-1) <= counts[..., None])
    own, likeliest = sampled.own[trunks, :positions], sampled.likeliest[trunks, :positions]
    return Verifications(setting, verified, known, stated, choice, own, likeliest, weighed)


def ends(choices: Int32Array, stop: Int32Array) -> BoolArray:
    """Which choices, ``[B, positions, C]``, are end tokens; ``stop`` is ``[B, stop tokens]``."""
    found: BoolArray = (choices[..., None] == stop[:, None, None, :]).any(-1)
    return found
