"""Handing q', what drafted tokens were sampled from, to vLLM's rejection sampler.

vLLM's V1 runner takes the draft's probabilities as ``[rows, K, vocabulary]`` float32 with the
request of each row, both set within ``propose()`` and used by the next step's sampling. If one
request that has drafts is without a row, the whole batch is verified as if all drafts were
certain. That is exact as well, only less is accepted. A token x that was drawn from q' without
regard to what verification will draw is accepted with probability p(x), else another one is drawn
from p without x:

    P(y) = q'(y) p(y) + sum over x != y of q'(x) (1 - p(x)) p(y) / (1 - p(x)) = p(y)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_ssd.core.arrays import Float32Array, Int64Array
from vllm_ssd.core.distributions import dense_bytes
from vllm_ssd.core.stats import Stats
from vllm_ssd.target.sources import Sources

LARGEST_BYTES = 256 << 20
"""Of the dense rows: with K = 6 enough for 87 requests at a vocabulary of 128,000 tokens, and for
349 at 32,000. Larger batches are verified as if all drafts were certain."""


class SparseRows(NamedTuple):
    """The distributions of all proposals of a batch."""

    rows: list[int]
    """The batch rows that have a proposal."""
    indices: Int64Array
    """Of the entries above 0 in ``[len(rows), K, vocabulary]``, flattened."""
    values: Float32Array
    """Their probabilities."""


def most_bytes(requests: int, depth: int, vocab_size: int) -> int:
    """Bytes that batches of at most so many requests take: the dense rows, and vLLM's copy."""
    return 2 * min(dense_bytes(requests, depth, vocab_size), LARGEST_BYTES)


class HandOver:
    """Sets the runner's draft probabilities, on every tensor-parallel rank.

    Every rank samples for itself, so all must have the same q'. The rank that has the draft sends
    the sparse rows to the others.

    Args:
        runner: vLLM's model runner.
        depth: K.
        vocab_size: the target's.
        most_requests: of a batch.
        stats: counters to keep.
        group: vLLM's tensor-parallel group; ``None`` if there is only one rank.
    """

    def __init__(
        self,
        runner: Any,
        depth: int,
        vocab_size: int,
        most_requests: int,
        stats: Stats,
        group: Any = None,
    ) -> None:
        self._runner = runner
        self._depth, self._vocab_size = depth, vocab_size
        self._stats = stats
        self.group = group
        self._planned = most_bytes(most_requests, depth, vocab_size) // 8
        """Entries that the memory plan has room for."""
        self._dense = torch.empty(0)
        """``[most rows so far * K * vocabulary]``; 0 but at ``_set``."""
        self._set: list[torch.Tensor] = []
        """Indices of what is not 0."""
        self._has: set[str] = set()
        """The requests that have a row for the next sampling."""

    @property
    def is_needed(self) -> bool:
        """Whether a request of the batch samples; the same on all ranks."""
        return not self._runner.input_batch.all_greedy

    def collect(
        self, proposals: Sequence[Sequence[int]], sources: Sequence[Sources]
    ) -> SparseRows | None:
        """The distributions of what is proposed, one for each token; certain ones have one entry.

        Args:
            proposals: for each row of the batch.
            sources: what of them was sampled, and from what. All else is certain (other drafts,
                padding).

        Returns:
            ``None`` if all tokens are certain, or if the dense rows would take too much memory.
        """
        if not sources:
            return None
        rows = [row for row, tokens in enumerate(proposals) if tokens]
        if dense_bytes(len(rows), self._depth, self._vocab_size) > LARGEST_BYTES:
            self._stats.batches_too_large += 1
            return None
        depth, vocab_size = self._depth, self._vocab_size
        index = np.zeros(len(proposals), np.int64)
        index[rows] = np.arange(len(rows))
        certain = np.full((len(rows), depth), -1, np.int64)
        for held, row in zip(certain, rows, strict=True):
            held[: len(proposals[row])] = proposals[row]
        indices, values = [], []
        for source in sources:
            place = index[source.rows] * depth + source.at
            indices.append(np.repeat(place * vocab_size, source.supports) + source.tokens)
            values.append(source.probabilities)
            sampled = place[source.supports > 0]
            certain.ravel()[sampled] = -1
            self._stats.tokens_with_probabilities += len(sampled)
        self._stats.batches_with_probabilities += 1
        places = np.flatnonzero(certain >= 0)
        indices.append(places * vocab_size + certain.ravel()[places])
        values.append(np.ones(len(places), np.float32))
        return SparseRows(rows, np.concatenate(indices), np.concatenate(values))

    def give(self, sparse: SparseRows | None) -> None:
        """Hand over a batch's distributions, on the rank that has the draft, and to the others.

        Other ranks wait for them in :meth:`receive` in every step in which they are needed: also
        where there are none, or an error has cost them.
        """
        if self.group is not None:
            self.group.broadcast_object(sparse, src=0)
        self._take(sparse)

    def receive(self) -> None:
        """Hand over a batch's distributions, on any other rank."""
        self._take(self.group.broadcast_object(None, src=0))

    @torch.inference_mode()
    def _take(self, sparse: SparseRows | None) -> None:
        self._has.clear()
        if sparse is None:
            return
        for indices in self._set:
            self._dense.index_fill_(0, indices, 0.0)
        self._set.clear()
        self._make_room(len(sparse.rows))
        self._fill(sparse.indices, sparse.values)
        req_ids = [self._runner.input_batch.req_ids[row] for row in sparse.rows]
        self._has.update(req_ids)
        self._show(req_ids)

    @torch.inference_mode()
    def complete(self, scheduled: Mapping[str, Sequence[int]]) -> None:
        """Add rows for requests with drafts that are not of the last proposal.

        Those were proposed earlier and wait since then; they count as certain. And vLLM's
        placeholders (-1), which are always rejected: in their place a token from p - 0.

        Args:
            scheduled: the drafts of the step that comes next, by request; the same on all ranks.
        """
        req_ids: list[str] | None = self._runner._draft_prob_req_ids
        if req_ids is None or scheduled.keys() <= self._has:
            return
        others = [req_id for req_id in scheduled if req_id not in self._has]
        if dense_bytes(len(req_ids + others), self._depth, self._vocab_size) > LARGEST_BYTES:
            self._runner._draft_probs = self._runner._draft_prob_req_ids = None
            return
        row = self._depth * self._vocab_size
        tokens = [
            (len(req_ids) + i) * row + at * self._vocab_size + token
            for i, req_id in enumerate(others)
            for at, token in enumerate(scheduled[req_id])
            if token >= 0
        ]
        self._make_room(len(req_ids) + len(others))
        self._fill(np.array(tokens, np.int64), np.ones(len(tokens), np.float32))
        self._has.update(others)
        self._show(req_ids + others)

    def _make_room(self, rows: int) -> None:
        size = rows * self._depth * self._vocab_size
        had = len(self._dense)
        if size <= had:
            return
        size = max(size, min(2 * had, self._planned))
        dense = torch.zeros(size, dtype=torch.float32, device=self._runner.device)
        if self._set:
            dense[:had] = self._dense
        self._dense = dense

    def _fill(self, indices: Int64Array, values: Float32Array) -> None:
        device = self._runner.device
        at = async_tensor_h2d(indices, device=device)
        # No index comes twice; several times as fast on CPU as index_put_().
        self._dense.index_copy_(0, at, async_tensor_h2d(values, device=device))
        self._set.append(at)

    def _show(self, req_ids: list[str]) -> None:
        rows = self._dense[: len(req_ids) * self._depth * self._vocab_size]
        self._runner._draft_probs = rows.view(len(req_ids), self._depth, self._vocab_size)
        self._runner._draft_prob_req_ids = req_ids
