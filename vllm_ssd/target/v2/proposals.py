"""A step's proposals and its outcome, computed on the device: what the main thread enqueues.

On a GPU this is one CUDA graph for each size of the batch, and one more where requests sample,
since enqueuing some 120 operations one by one would take the main thread half a millisecond.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch

from vllm_ssd.target.v2.device_sources import Sampled
from vllm_ssd.target.v2.device_trees import DeviceTrees
from vllm_ssd.target.v2.look_up import look_up
from vllm_ssd.target.v2.ngram import Ngrams
from vllm_ssd.target.v2.outcomes import pack_outcome


class Proposed(NamedTuple):
    """For B requests."""

    drafts: torch.Tensor
    """``[B, K]`` int64; good until the next call."""
    outcome: torch.Tensor
    """As returned by :func:`pack_outcome`; a tensor of its own."""
    sampled: Sampled | None
    """What they were sampled from, if that was asked for; good until the next call."""


class _Inputs(NamedTuple):
    slots: torch.Tensor
    num_sampled: torch.Tensor
    num_rejected: torch.Tensor


class _Graph(NamedTuple):
    """A captured graph with the memory it reads and writes."""

    inputs: _Inputs
    graph: torch.cuda.CUDAGraph
    results: Proposed


class Proposals:
    """Computes them.

    Args:
        trees: the speculation cache.
        req_states: the runner's ``RequestState``, whose tensors stay where they are.
        from_text: what the draft lacks comes from the text, where tokens of it came before.
    """

    def __init__(self, trees: DeviceTrees, req_states: Any, from_text: bool) -> None:
        self._trees = trees
        self._req_states = req_states
        self._ngrams: Ngrams | None = None
        if from_text:
            length, device = req_states.all_token_ids.gpu.shape[1], req_states.device
            self._ngrams = Ngrams(trees.depth, trees.vocab_size, length, device)
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        """By the size of the batch, powers of 2, and whether requests sample."""

    def compute(
        self,
        slots: torch.Tensor,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        sampling: bool = False,
    ) -> Proposed:
        """Look up, and pack the outcome; neither waits for the device.

        Args:
            slots: ``[B]`` int64.
            num_sampled: ``[B]`` int32.
            num_rejected: ``[B]`` int32.
            sampling: whether what tokens were sampled from is wanted.
        """
        inputs = _Inputs(slots, num_sampled, num_rejected)
        count = len(slots)
        captured = self._graphs.get((_size(count), sampling))
        if captured is None:
            return self._compute(inputs, sampling)
        # What lies behind the first B is of an earlier batch, and its results are not read.
        for theirs, ours in zip(inputs, captured.inputs, strict=True):
            ours[:count].copy_(theirs, non_blocking=True)
        captured.graph.replay()
        # The outcome leaves on another stream, and may still do so when the graph runs next.
        drafts, outcome, sampled = captured.results
        if sampled is not None:
            sampled = Sampled(*(part[:count] for part in sampled))
        return Proposed(drafts[:count], outcome[:count].clone(), sampled)

    def capture(self) -> None:
        """Capture the graphs, on a GPU.

        Raises:
            Exception: as torch and CUDA do; there are no graphs then, and none is needed.
        """
        self.forget_graphs()
        most, device = self._req_states.max_num_reqs, self._req_states.device
        if device.type != "cuda":
            return
        # The largest comes first: in a pool that they share, the others find room in what it took.
        # They run one after the other, and what one returns is read before the next one runs.
        graphs, pool = {}, torch.cuda.graph_pool_handle()
        sizes = sorted({_size(count) for count in range(1, most + 1)}, reverse=True)
        ways = [False, True] if self._trees.sources is not None else [False]
        for size, sampling in product(sizes, reversed(ways)):
            inputs = _Inputs(
                torch.zeros(size, dtype=torch.int64, device=device),
                torch.zeros(size, dtype=torch.int32, device=device),
                torch.zeros(size, dtype=torch.int32, device=device),
            )
            self._compute(inputs, sampling)  # what is set up at the first use must not be captured
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                results = self._compute(inputs, sampling)
            graphs[size, sampling] = _Graph(inputs, graph, results)
        self._graphs = graphs

    @property
    def graphs(self) -> int:
        """How many are captured."""
        return len(self._graphs)

    def forget_graphs(self) -> None:
        """Free the graphs; without one, operations are enqueued one by one."""
        self._graphs = {}

    def _compute(self, inputs: _Inputs, sampling: bool) -> Proposed:
        states = self._req_states
        slots, num_sampled, num_rejected = inputs
        texts, lengths = states.all_token_ids.gpu, states.total_len.gpu
        last = states.last_sampled_tokens
        found = look_up(self._trees, texts, lengths, last, slots, num_sampled)
        if self._ngrams is None:
            matched = torch.zeros_like(found.drafted)
        else:
            found, matched = self._ngrams.prolong(found, texts, lengths, slots, num_sampled)
        sampled: Sampled | None = None
        count = torch.zeros_like(found.drafted)
        sources, ahead = self._trees.sources, self._trees.counting[: self._trees.depth]
        if sampling and sources is not None:
            first, drafted = lengths[slots], found.drafted
            sampled = sources.read(found.row, found.life, first, found.drafts, drafted, ahead)
            count = sampled.count
        outcome = pack_outcome(
            self._trees, found, matched, count, texts, lengths, slots, num_sampled, num_rejected
        )
        return Proposed(found.drafts, outcome, sampled)


def _size(count: int) -> int:
    """The next power of 2."""
    return 1 << (count - 1).bit_length()
