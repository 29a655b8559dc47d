"""The draft's engine: takes the target's messages, decodes all branches in one batch, publishes.

Per request there is a trunk, which follows the confirmed text and the tokens being verified, and
forks off the trunk, one for each guessed outcome (:mod:`vllm_ssd.draft.rounds`). All rows of all
requests are decoded together, one token a step, and every step is published at once.
"""

from __future__ import annotations

import time

import numpy as np

from vllm_ssd.core.budget import StepTimeModel
from vllm_ssd.core.tree import Int32Array
from vllm_ssd.draft.blocks import KVBlocks, VerifiedPrefix
from vllm_ssd.draft.forward import DraftModel, Sequences
from vllm_ssd.draft.request import Request
from vllm_ssd.draft.rounds import Policy, Rounds
from vllm_ssd.draft.rows import MAX_STOP_TOKENS, Rows
from vllm_ssd.draft.tenancy import Tenancy
from vllm_ssd.wire.messages import (
    Finished,
    Outcomes,
    Start,
    Stepped,
    ToTarget,
    Trimmed,
    pack,
    unpack,
)

COUNTERS = (
    "draft_steps",
    "draft_step_seconds",
    "draft_python_seconds",
    "draft_rows",
    "draft_rounds",
    "draft_round_seconds",
    "draft_forks",
    "draft_prefill_tokens",
    "draft_narrowed",
    "draft_evictions",
)
_SMOOTHING = 0.2
"""Weight of the newest verification time."""


class OutOfStepError(Exception):
    """What the target says does not fit what it said before: a new epoch is needed."""


class DraftEngine:
    """Requests and rounds over one draft model.

    Args:
        model: the draft model.
        rows: the rows of its batch.
        blocks: the blocks of its KV cache.
        policy: which outcomes are guessed.
        prefill_chunk: most prompt tokens per step while other requests decode.
        prefill_chunk_idle: the same while none does.
    """

    def __init__(
        self,
        model: DraftModel,
        rows: Rows,
        blocks: KVBlocks,
        policy: Policy,
        prefill_chunk: int,
        prefill_chunk_idle: int,
    ) -> None:
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        self.model = model
        self.rows = rows
        self.tenancy = Tenancy(model, rows, blocks, self.counters)
        self._clock = StepTimeModel()
        self._rounds = Rounds(self.tenancy, policy, self._clock)
        self._prefill_chunk = prefill_chunk
        self._prefill_chunk_idle = prefill_chunk_idle
        self._round_began: float | None = None

    # ---- what the target says

    def reset(self) -> None:
        """Forget all requests; the KV of verified prefixes stays in the cache."""
        for request in list(self.tenancy.requests.values()):
            self.tenancy.remove(request)

    def start(self, message: Start) -> None:
        """A new request, or a known one whose text is announced again."""
        known = self.tenancy.requests.get(message.handle)
        if known is not None:
            self.tenancy.remove(known)
        tokens = unpack(message.tokens)
        stop = np.full(MAX_STOP_TOKENS, -1, np.int32)
        ends = message.stop[:MAX_STOP_TOKENS]
        stop[: len(ends)] = ends
        request = Request(
            message.handle, tokens.copy(), len(tokens), message.limit, stop, VerifiedPrefix()
        )
        request.last_used = self.tenancy.frame
        self.tenancy.requests[message.handle] = request
        self._rounds.begin(request, [])

    def finished(self, message: Finished) -> None:
        """Free what finished requests hold."""
        for handle in unpack(message.handles).tolist():
            request = self.tenancy.requests.get(handle)
            if request is not None:
                self.tenancy.remove(request)

    def trimmed(self, message: Trimmed) -> None:
        """The scheduler lets fewer drafts be verified than were proposed."""
        counts = unpack(message.verified_counts).tolist()
        for handle, verified in zip(unpack(message.handles).tolist(), counts, strict=True):
            request = self.tenancy.requests.get(handle)
            if request is not None:
                self._rounds.trim(request, verified)

    def outcomes(self, message: Outcomes) -> None:
        """Follow what was confirmed and guess what comes next.

        Raises:
            OutOfStepError: the text does not continue what is known of the request.
        """
        self.tenancy.frame += 1
        handles = unpack(message.handles).tolist()
        lengths = unpack(message.lengths).tolist()
        confirmed = unpack(message.confirmed_counts).tolist()
        proposed = unpack(message.proposed_counts).tolist()
        tokens = unpack(message.tokens).tolist()
        self._rounds.batch = len(handles)
        if message.verify_us:
            seconds = message.verify_us * 1e-6
            before = self._rounds.verify_seconds or seconds
            self._rounds.verify_seconds = before + _SMOOTHING * (seconds - before)
        at = 0
        for handle, length, n_confirmed, n_proposed in zip(
            handles, lengths, confirmed, proposed, strict=True
        ):
            request = self.tenancy.requests.get(handle)
            middle = at + n_confirmed
            end = middle + n_proposed
            if request is None or request.length != length or end > len(tokens):
                raise OutOfStepError(f"request {handle} at length {length}")
            self._rounds.follow(request, tokens[at:middle], tokens[middle:end])
            at = end
        if self._round_began is None and self.has_work:
            self._round_began = time.perf_counter()

    # ---- one step

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self.tenancy.catching_up) or bool(self.rows.pending.any())

    def publications(self) -> list[ToTarget]:
        """What changed in the trees since the last call."""
        return self.tenancy.publisher.messages()

    def step(self) -> list[ToTarget]:
        """Decode every pending row by one token, prefill some, fork where candidates became known.

        Returns:
            What to publish, in order.
        """
        began = time.perf_counter()
        messages = self.publications()
        decoding = np.flatnonzero(self.rows.pending).astype(np.int32)
        chunks = self._next_chunks(len(decoding))
        sequences = self._sequences(decoding, chunks)
        forward_began = time.perf_counter()
        top = self.model.forward(sequences)
        forward_seconds = time.perf_counter() - forward_began
        grown, tokens = self._take_results(decoding, chunks, top)
        if len(grown):
            ended = grown[self.rows.cache.ended[grown]]
            messages.append(Stepped(pack(grown), pack(tokens), pack(ended)))
        for request in self.tenancy.requests.values():
            if request.next_k < len(request.forks_wanted):
                self._rounds.fork(request)
        messages += self.publications()
        self._count(len(decoding), bool(chunks), began, forward_seconds)
        return messages

    def _next_chunks(self, decoding: int) -> list[tuple[Request, int]]:
        """Which requests catch up with their text in this step, and by how many tokens."""
        budget = self._prefill_chunk if decoding else self._prefill_chunk_idle
        chunks: list[tuple[Request, int]] = []
        for request in self.tenancy.catching_up.values():
            missing = request.length - int(self.rows.computed[request.trunk])
            count = min(missing, budget)
            chunks.append((request, count))
            budget -= count
            if budget == 0:
                break
        # A chunk of one token is a decode to the model, and decodes come first.
        chunks.sort(key=lambda chunk: chunk[1] > 1)
        return chunks

    def _sequences(self, decoding: Int32Array, chunks: list[tuple[Request, int]]) -> Sequences:
        """The forward's input: the decoding rows, then the chunks."""
        rows, size = self.rows, self.tenancy.blocks.block_size
        positions = rows.computed[decoding]
        if not chunks:
            tables = rows.block_table[decoding, : int(positions.max()) // size + 1]
            ones = np.ones(len(decoding), np.int32)
            return Sequences(tables, ones, rows.feed_token[decoding], positions)
        all_tokens, all_positions = [rows.feed_token[decoding]], [positions]
        for request, count in chunks:
            start = int(rows.computed[request.trunk])
            all_tokens.append(request.text[start : start + count])
            all_positions.append(np.arange(start, start + count, dtype=np.int32))
        counts = np.array([count for _, count in chunks], np.int32)
        trunks = np.array([request.trunk for request, _ in chunks], np.int32)
        positions = np.concatenate(all_positions)
        tables = rows.block_table[np.concatenate([decoding, trunks])]
        self.counters["draft_prefill_tokens"] += int(counts.sum())
        return Sequences(
            tables[:, : int(positions.max()) // size + 1],
            np.concatenate([np.ones(len(decoding), np.int32), counts]),
            np.concatenate(all_tokens),
            positions,
        )

    def _take_results(
        self, decoding: Int32Array, chunks: list[tuple[Request, int]], top: Int32Array
    ) -> tuple[Int32Array, Int32Array]:
        """Grow the rows that decoded, and the trunks that have caught up."""
        rows = self.rows
        caught_up, at = [], []
        for i, (request, count) in enumerate(chunks, start=len(decoding)):
            rows.computed[request.trunk] += count
            self.tenancy.share_verified(request)
            if int(rows.computed[request.trunk]) == request.length:
                del self.tenancy.catching_up[request.handle]
                # As if it had only fed its last token, like every row that decodes.
                rows.computed[request.trunk] -= 1
                caught_up.append(request.trunk)
                at.append(i)
        if caught_up:
            fed = np.concatenate([decoding, np.array(caught_up, np.int32)])
            top = top[np.concatenate([np.arange(len(decoding)), np.array(at)])]
            return rows.take_step(fed, top)
        return rows.take_step(decoding, top[: len(decoding)])

    def _count(self, rows: int, prefill: bool, began: float, forward_seconds: float) -> None:
        now = time.perf_counter()
        if not prefill:
            self._clock.observe(rows, now - began)
        counters = self.counters
        counters["draft_steps"] += 1
        counters["draft_rows"] += rows
        counters["draft_step_seconds"] += now - began
        counters["draft_python_seconds"] += now - began - forward_seconds
        if self._round_began is not None and not self.has_work:
            counters["draft_rounds"] += 1
            counters["draft_round_seconds"] += now - self._round_began
            self._round_began = None
