"""A draft model that answers from what its KV cache really holds.

Its next token is a hash of the whole text as read back through the block table. A wrong block
table, a missing copy, a stale slot or a write into a shared block changes its answer, or fails an
assertion here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_ssd.core.arrays import Float32Array, Int32Array
from vllm_ssd.draft.model import (
    FROM_LAST_STEP,
    BlockChanges,
    Choices,
    Done,
    Sampling,
    Sequences,
    Ticket,
)
from vllm_ssd.draft.sampling import (
    SMALLEST,
    draw,
    parameters_on_host,
    proposals,
    requested,
    shares,
)

NOTHING = -1
_MOST_ROWS = 256
_LONGEST = 4096
_WEIGHTS = np.random.default_rng(0).integers(1, 2**63, _LONGEST, np.uint64) | np.uint64(1)


def prefix_hashes(tokens: Int32Array) -> NDArray[np.uint64]:
    """A number for each beginning of a text: what the KV of a position depends on."""
    return np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * _WEIGHTS[: len(tokens)])


def best_tokens(text: list[int], vocab_size: int, count: int) -> list[int]:
    """The model: its ``count`` best next tokens after ``text``, best first."""
    tokens = np.array(text, np.int32)
    return _best(prefix_hashes(tokens)[-1:], vocab_size)[0, :count].tolist()


def greedy(text: list[int], vocab_size: int, count: int) -> list[int]:
    """The ``count`` tokens the model goes on with."""
    grown = list(text)
    for _ in range(count):
        grown += best_tokens(grown, vocab_size, 1)
    return grown[len(text) :]


def toy_q(
    text: list[int],
    vocab_size: int,
    first: float,
    count: int,
    candidates: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    weighed: int = 0,
    weight: float = 1.0,
) -> NDArray[np.float64]:
    """q' after a text as the paper and vLLM define it, by loops; ``[vocab_size]``.

    Args:
        text: what was drafted so far, with the text before it.
        vocab_size: the model's tokens.
        first: the model's confidence in its first choice.
        count: N.
        candidates: how many best tokens the model looks at; it cuts by top-k and top-p among those.
        temperature: of the request.
        top_k: of the request; 0: no such bound.
        top_p: of the request.
        stop: its end tokens.
        weighed: how many of the likeliest tokens are weighed ...
        weight: ... by C.
    """
    order = best_tokens(text, vocab_size, vocab_size)
    base = best_first(np.array([first]), vocab_size)[0].astype(np.float64)
    base = base[: max(count, candidates)]
    heat = base ** (1.0 / temperature)
    if top_k:
        heat[top_k:] = 0.0
    heat /= heat.sum()
    q = np.zeros(vocab_size)
    before = 0.0
    for token, share in zip(order, heat.tolist(), strict=False):
        if before < top_p:
            q[token] = share
        before += share
    q[order[count:]] = 0.0
    q /= q.sum()
    q[list(stop)] = 0.0
    if q.sum() <= (0.5 if order[0] in stop else 0.0):
        return np.eye(vocab_size)[order[0]]
    lighter = q.copy()
    for token in [token for token in order if q[token]][:weighed]:
        lighter[token] *= weight
    q = lighter if lighter.sum() > 1e-6 else q
    q[q < SMALLEST * q.sum()] = 0.0
    return q / q.sum()


def _best(hashes: NDArray[np.uint64], vocab_size: int) -> Int32Array:
    """All tokens after the texts with these hashes, best first; ``[n, vocab_size]``."""
    scores = hashes[:, None] ^ _WEIGHTS[-vocab_size:]
    for shift in (33, 29):  # splitmix64's finish: all bits depend on all bits
        scores = (scores ^ (scores >> np.uint64(shift))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.argsort(scores, axis=1).astype(np.int32)


def stated(first: NDArray[np.float64], count: int) -> Float32Array:
    """Probabilities of ``count`` choices: that of the first, half of what is left for each next."""
    others = 0.5 ** np.arange(1.0, count)
    shares = others / max(others.sum(), 1e-9)
    rest = (1.0 - first)[:, None] * shares
    return np.concatenate([first[:, None], rest], axis=1).astype(np.float32)


def best_first(first: NDArray[np.float64], count: int) -> Float32Array:
    """The same numbers in the order in which a real model has them."""
    return np.sort(stated(first, count), axis=1)[:, ::-1].copy()


class ToyModel:
    """A :class:`vllm_ssd.draft.model.DraftModel` of numpy arrays.

    Args:
        num_blocks: blocks of its KV cache.
        block_size: tokens per block.
        vocab_size: its tokens.
        num_candidates: how many best tokens a forward returns.
        num_sampled_from: how many best tokens are sampled from.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        num_candidates: int,
        num_sampled_from: int = 0,
    ) -> None:
        shape = (num_blocks, block_size)
        self.vocab_size = vocab_size
        self.lookahead = False
        self.graph_steps = 0
        self.forwards = 0
        self.sequences: list[int] = []
        """How many sequences each forward had."""
        self.before_write: Callable[[set[int]], None] = lambda blocks: None
        """Called with the blocks that are about to be written."""
        self.confidence_at: Callable[[int], float] = lambda position: 0.5
        """The confidence in the first choice for a position."""
        self._size = block_size
        self.num_candidates = num_candidates
        self._num_sampled_from = num_sampled_from
        self.random = np.random.default_rng(0)
        self._tables = np.zeros((_MOST_ROWS, num_blocks), np.int32)
        self._position = np.full(shape, NOTHING, np.int32)
        self._token = np.full(shape, NOTHING, np.int32)
        self._prefix = np.zeros(shape, np.uint64)

    def launch(self, changes: BlockChanges, sequences: Sequences) -> Ticket:
        """Answer at once."""
        self._apply(changes)
        return Done(self._compute(sequences))

    def _apply(self, changes: BlockChanges) -> None:
        """Copy blocks and update block tables."""
        sources, destinations = changes.sources.tolist(), changes.destinations.tolist()
        assert len(sources) == len(destinations) == len(set(destinations))
        assert not set(sources) & set(destinations)
        self._may_write(set(destinations))
        for held in (self._position, self._token, self._prefix):
            held[destinations] = held[sources]
        forks, trunks = changes.forks.tolist(), changes.trunks.tolist()
        assert len(set(forks)) == len(forks)
        self._tables[forks, : changes.shared] = self._tables[trunks, : changes.shared]
        entries = list(zip(changes.rows.tolist(), changes.columns.tolist(), strict=True))
        assert len(set(entries)) == len(entries)
        self._tables[changes.rows, changes.columns] = changes.blocks

    def _compute(self, sequences: Sequences) -> Choices:
        """Write, then read back, then answer."""
        rows, lens, tokens, positions, sampling = sequences
        assert len(rows) == len(lens) == len(set(rows.tolist())) > 0
        assert (tokens >= 0).all()
        assert len(tokens) == len(positions) == lens.sum()
        assert (lens > 0).all()
        assert sorted(lens > 1) == (lens > 1).tolist(), "sequences of one query token come first"
        tables = self._tables[rows]

        owner = np.repeat(np.arange(len(lens)), lens)
        blocks, offsets = tables[owner, positions // self._size], positions % self._size
        slots = (blocks * self._size + offsets).tolist()
        assert len(set(slots)) == len(slots), "two tokens into one slot"
        self._may_write(set(blocks.tolist()))
        # As in a real layer all writes of a forward come before all reads.
        self._position[blocks, offsets] = positions
        self._token[blocks, offsets] = tokens

        ends = np.cumsum(lens)
        hashes = np.zeros(len(lens), np.uint64)
        for i, (table, end, count) in enumerate(zip(tables, ends, lens, strict=True)):
            first, length = int(positions[end - count]), int(positions[end - 1]) + 1
            hashes[i] = self._read_back(table, first, length)
        self.forwards += 1
        self.sequences.append(len(lens))
        firsts = [self.confidence_at(int(positions[end - 1]) + 1) for end in ends]
        best = _best(hashes, self.vocab_size)
        if sampling is None:
            best = best[:, : self.num_candidates]
            return Choices.firsts(best, stated(np.array(firsts), best.shape[1]))
        return self._sample(best, np.array(firsts), sampling)

    def _sample(self, best: Int32Array, firsts: NDArray[np.float64], sampling: Sampling) -> Choices:
        """As the real model does, with the logits of the stated probabilities."""
        assert all(len(values) == len(best) for values in sampling)
        parameters = parameters_on_host(sampling)
        samples = self._num_sampled_from if sampling.sampled.any() else 0
        tokens = best[:, : max(self.num_candidates, samples)]
        with np.errstate(divide="ignore"):
            logits = np.log(best_first(firsts, self.vocab_size)[:, : tokens.shape[1]])
        q = requested(logits, parameters)
        probabilities = shares(q, self.num_candidates)
        if not samples:
            return Choices.firsts(tokens, probabilities)
        q, among = q[:, :samples], tokens[:, :samples]
        q = proposals(q, among, parameters)
        drawn = draw(q, among, self.random.random((len(q), 1)))
        return Choices(tokens, probabilities, drawn, q)

    def _read_back(self, table: Int32Array, first_new: int, length: int) -> np.uint64:
        """The hash of a sequence's text as its blocks hold it."""
        at = np.arange(length)
        blocks, offsets = table[at // self._size], at % self._size
        assert self._position[blocks, offsets].tolist() == at.tolist(), "holes or stale slots"
        hashes = prefix_hashes(self._token[blocks, offsets])
        # KV also depends on all tokens before it: a block is good for one beginning only.
        old = slice(0, first_new)
        assert (self._prefix[blocks[old], offsets[old]] == hashes[old]).all(), "KV of another text"
        new = slice(first_new, length)
        self._prefix[blocks[new], offsets[new]] = hashes[new]
        return hashes[-1]

    def _may_write(self, blocks: set[int]) -> None:
        assert 0 not in blocks, "the null block"
        self.before_write(blocks)


class LookaheadToyModel(ToyModel):
    """The same, with answers that are read later, as on a device with a stream of its own.

    Launches compute in their order; the host reads the results later.
    """

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.lookahead = True
        self.under_way: list[_Unread] = []
        """Launched and not read yet."""
        self._next_token: dict[int, int] = {}
        """What the newest launch chose for each of its rows."""

    def launch(self, changes: BlockChanges, sequences: Sequences) -> Ticket:
        """Compute; tokens left to the step before are taken from it."""
        assert len(self.under_way) < 2, "more than one step ahead"
        self._apply(changes)
        tokens = sequences.tokens.copy()
        for i in np.flatnonzero(tokens == FROM_LAST_STEP).tolist():
            assert len(tokens) == len(sequences.rows)
            assert self.under_way, "the host knows this token"
            tokens[i] = self._next_token[int(sequences.rows[i])]
        choices = self._compute(sequences._replace(tokens=tokens))
        grown = choices.next_tokens.tolist()
        self._next_token = dict(zip(sequences.rows.tolist(), grown, strict=True))
        unread = _Unread(self, choices)
        self.under_way.append(unread)
        return unread


class _Unread:
    """A ticket of :class:`LookaheadToyModel`."""

    def __init__(self, model: LookaheadToyModel, choices: Choices) -> None:
        self._model = model
        self._choices = choices

    def result(self) -> Choices:
        """Read once, in order."""
        assert self._model.under_way.pop(0) is self
        return self._choices
