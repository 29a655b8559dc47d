"""What rows know of sampling: how their next token is chosen, and what was sampled.

A token is sampled once and kept: a row that rests, with no room to grow, keeps the sample of its
next position together with its q', and grows by it when there is room again. The one exception is
the position at which a token is a guess of what the target emits, not a draft
(:attr:`SampledRows.guess_at`): there a row grows by the likeliest choice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arrays import BoolArray, Float32Array, Int32Array
from vllm_ssd.draft.model import Choices, Sampling


class Drawn(NamedTuple):
    """What rows grow by, ``[m]`` all."""

    tokens: Int32Array
    sampled: BoolArray
    """Whether each was sampled; the others are certain."""
    likeliest: Float32Array
    """The largest probability of its q'; 1 if it is certain."""
    q_tokens: Int32Array
    """``[sampled, N]``: what the sampled ones were sampled from ..."""
    q_probabilities: Float32Array
    """``[sampled, N]``, ... and q'."""

    @classmethod
    def certain(cls, tokens: Int32Array) -> Drawn:
        """Tokens of which none was sampled."""
        count = len(tokens)
        sampled, likeliest = np.zeros(count, np.bool_), np.ones(count, np.float32)
        return cls(tokens, sampled, likeliest, _NO_TOKENS, _NO_PROBABILITIES)


_NO_TOKENS: Int32Array = np.zeros((0, 0), np.int32)
_NO_PROBABILITIES: Float32Array = np.zeros((0, 0), np.float32)


class SampledRows:
    """How rows sample; arrays are indexed by row.

    Args:
        max_rows: rows in all.
        width: positions that a row can hold.
        num_speculative_tokens: K.
        num_sampled_from: N, sampled tokens come from so many; 0: none are sampled.
    """

    def __init__(
        self, max_rows: int, width: int, num_speculative_tokens: int, num_sampled_from: int
    ) -> None:
        self.num_sampled_from = num_sampled_from
        self.warm = False
        """Whether any request has had a temperature above 0: if not, there is nothing to do."""
        self.weighs = False
        """Whether any of them has been drafted for with C < 1."""
        self.temperature: Float32Array = np.zeros(max_rows, np.float32)
        """0: a greedy request, whose row is not concerned by anything here."""
        self.top_k: Int32Array = np.zeros(max_rows, np.int32)
        self.top_p: Float32Array = np.ones(max_rows, np.float32)
        self.setting: Int32Array = np.zeros(max_rows, np.int32)
        """How its request is drafted for (:class:`vllm_ssd.core.arms.Settings`)."""
        self.samples: BoolArray = np.zeros(max_rows, np.bool_)
        """Whether tokens are sampled; if not, they are first choices."""
        self.weight: Float32Array = np.ones(max_rows, np.float32)
        """C, by which the likeliest tokens are weighed ..."""
        self.weigh: Int32Array = np.zeros((max_rows, num_speculative_tokens), np.int32)
        """``[row, k]``: ... so many of them after k accepted tokens."""
        self.guess_at: Int32Array = np.full(max_rows, -1, np.int32)
        """The position of the token that is guessed to follow an outcome; the next one is the first
        that can be accepted or rejected."""
        self.own: Float32Array = np.zeros((max_rows, width), np.float32)
        """``[row, i]``: the probability in its q' of the token at position ``start + i``; 0 if it
        is certain."""
        self.likeliest: Float32Array = np.ones((max_rows, width), np.float32)
        """``[row, i]``: the largest probability of that q'; 1 if the token is certain."""
        self.weighed: Int32Array = np.zeros((max_rows, width), np.int32)
        """``[row, i]``: how many of the likeliest tokens C weighed in it."""
        self._keeps: BoolArray = np.zeros(max_rows, np.bool_)
        """Whether a resting row keeps a sample: ..."""
        self._kept: Int32Array = np.zeros(max_rows, np.int32)
        """... this token ..."""
        self._kept_tokens: Int32Array = np.zeros((max_rows, num_sampled_from), np.int32)
        self._kept_q: Float32Array = np.zeros((max_rows, num_sampled_from), np.float32)
        """... of this q'."""
        self._of_request = (
            self.temperature,
            self.top_k,
            self.top_p,
            self.setting,
            self.samples,
            self.weight,
            self.weigh,
        )

    def begin(self, row: int) -> None:
        """A row is the trunk of a request that nothing is drafted for yet.

        The row may have been another target's, whose settings mean something else.
        """
        self.temperature[row] = self.top_k[row] = self.setting[row] = 0
        self.top_p[row] = self.weight[row] = 1.0
        self.samples[row] = self._keeps[row] = False
        self.guess_at[row] = -1

    def fork(self, rows: Int32Array, trunks: Int32Array, starts: Int32Array) -> None:
        """Rows sample as the trunks they leave; their first token is a guess."""
        self.guess_at[rows] = starts
        if not self.warm:
            return
        for values in self._of_request:
            values[rows] = values[trunks]
        self._keeps[rows] = False

    def forget(self, row: int) -> None:
        """A row begins anew: what it has kept is of another text."""
        self._keeps[row] = False

    def by_position(self, row: int) -> tuple[Float32Array, Float32Array, Int32Array]:
        """What is kept of each position of a row, as views."""
        return self.own[row], self.likeliest[row], self.weighed[row]

    def sampling(
        self, rows: Int32Array, positions: Int32Array, stop: Int32Array
    ) -> Sampling | None:
        """How a step chooses the next tokens of rows.

        Args:
            rows: ``[n]``.
            positions: ``[n]``, where these tokens will be.
            stop: ``[max_rows, stop tokens]``, the end tokens of each row.

        Returns:
            None if all rows are of greedy requests.
        """
        if not self.warm:
            return None
        temperature = self.temperature[rows]
        if not temperature.any():
            return None
        after_guess = positions - self.guess_at[rows] - 1
        sampled = self.samples[rows] & (after_guess != -1)
        weight = self.weight[rows]
        weighed: Int32Array = np.zeros(len(rows), np.int32)
        if self.weighs:
            which = sampled & (weight < 1.0)
            depth = np.minimum(np.maximum(after_guess[which], 0), self.weigh.shape[1] - 1)
            weighed[which] = self.weigh[rows[which], depth]
        ends = stop[rows]
        used = int(np.count_nonzero((ends >= 0).any(axis=0)))
        return Sampling(
            sampled,
            temperature,
            self.top_k[rows],
            self.top_p[rows],
            np.ascontiguousarray(ends[:, :used]),
            weighed,
            weight,
        )

    def take_step(
        self,
        rows: Int32Array,
        at: Int32Array,
        choices: Choices,
        sampling: Sampling | None,
        grows: BoolArray,
        forced: Int32Array | None,
    ) -> Drawn:
        """Take in what a step chose.

        Args:
            rows: ``[n]``.
            at: ``[n]``, the index in each row of its next token.
            choices: of the n rows.
            sampling: how they were chosen.
            grows: ``[n]``, which rows grow by their next token now; the others rest.
            forced: ``[n]``, tokens that take the place of what was chosen; -1 for none. None if
                there are none.

        Returns:
            Of the rows that grow.
        """
        tokens = choices.next_tokens
        if forced is not None:
            tokens = np.where(forced >= 0, forced, tokens)
        if sampling is None:
            return Drawn.certain(tokens[grows])
        q = choices.proposals
        if q is None:
            self.own[rows, at] = 0.0
            self.likeliest[rows, at] = 1.0
            self._keeps[rows] = False
            return Drawn.certain(tokens[grows])
        among = choices.tokens[:, : q.shape[1]]
        own = (q * (among == tokens[:, None])).max(axis=1)
        sampled = own < 1.0
        if forced is not None:
            sampled &= forced < 0
        likeliest = np.where(sampled, q.max(axis=1), np.float32(1.0))
        self.own[rows, at] = np.where(sampled, own, np.float32(0.0))
        self.likeliest[rows, at] = likeliest
        self.weighed[rows, at] = sampling.weighed
        keeps = sampled & ~grows
        self._keeps[rows] = keeps
        if keeps.any():
            resting = rows[keeps]
            self._kept[resting] = tokens[keeps]
            self._kept_tokens[resting] = among[keeps]
            self._kept_q[resting] = q[keeps]
        drawn = sampled & grows
        return Drawn(tokens[grows], sampled[grows], likeliest[grows], among[drawn], q[drawn])

    def resume(
        self,
        rows: Int32Array,
        at: Int32Array,
        positions: Int32Array,
        firsts: Int32Array,
        forced: Int32Array | None,
    ) -> Drawn:
        """What resting rows grow by.

        Args:
            rows: ``[m]``.
            at: ``[m]``, the index in each row of the token it grows by.
            positions: ``[m]``, the positions of these tokens.
            firsts: ``[m]``, their first choices.
            forced: ``[m]``, tokens that take the place of what was chosen; -1 for none. None if
                there are none.
        """
        if forced is not None:
            firsts = np.where(forced >= 0, forced, firsts)
        if not self.warm:
            return Drawn.certain(firsts)
        kept = self._keeps[rows] & (positions != self.guess_at[rows])
        if forced is not None:
            kept &= forced < 0
        self._keeps[rows] = False
        certain = rows[~kept], at[~kept]
        self.own[certain] = 0.0
        self.likeliest[certain] = 1.0
        if not kept.any():
            return Drawn.certain(firsts)
        return Drawn(
            np.where(kept, self._kept[rows], firsts),
            kept,
            self.likeliest[rows, at],
            self._kept_tokens[rows[kept]],
            self._kept_q[rows[kept]],
        )
