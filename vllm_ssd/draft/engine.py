"""The draft's engine: takes the target's messages, decodes all branches in one batch, publishes.

Per request there is a trunk, which follows the confirmed text and the tokens being verified, and
forks off the trunk, one for each guessed outcome (:mod:`vllm_ssd.draft.rounds`). All rows of all
requests are decoded together, one token a step, and every step is published at once.
"""

from __future__ import annotations

import time

import numpy as np

from vllm_ssd.core.budget import StepTimeModel
from vllm_ssd.draft.blocks import KVBlocks, VerifiedPrefix
from vllm_ssd.draft.model import DraftModel
from vllm_ssd.draft.pipeline import Pipeline, Taken
from vllm_ssd.draft.request import Request
from vllm_ssd.draft.rounds import Policy, Rounds
from vllm_ssd.draft.rows import MAX_STOP_TOKENS, Rows
from vllm_ssd.draft.tenancy import Tenancy
from vllm_ssd.wire.messages import (
    Finished,
    Start,
    Stepped,
    ToTarget,
    Trimmed,
    Verified,
    pack,
    unpack,
)

COUNTERS = (
    "draft_steps",
    "draft_step_seconds",
    "draft_python_seconds",
    "draft_rows",
    "draft_rounds",
    "draft_rounds_cut",
    "draft_round_seconds",
    "draft_forks",
    "draft_prefill_tokens",
    "draft_narrowed",
    "draft_evictions",
)


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
        self._pipeline = Pipeline(model, self.tenancy, prefill_chunk, prefill_chunk_idle)
        self._unsent: list[ToTarget] = []
        self._counted = 0.0
        """When the newest step was counted."""
        self._round_began: float | None = None

    # ---- what the target says

    def reset(self) -> None:
        """Forget all requests; the KV of verified prefixes stays in the cache."""
        self._pipeline.settle()
        self._unsent.clear()
        for request in list(self.tenancy.requests.values()):
            self.tenancy.remove(request)
        self._round_began = None

    def start(self, message: Start) -> None:
        """A new request, or a known one whose text is announced again."""
        self._settle()
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
        self._settle()
        for handle in unpack(message.handles).tolist():
            request = self.tenancy.requests.get(handle)
            if request is not None:
                self.tenancy.remove(request)
        self._end_idle_round()

    def trimmed(self, message: Trimmed) -> None:
        """The scheduler lets fewer drafts be verified than were proposed."""
        self._settle()
        counts = unpack(message.verified_counts).tolist()
        for handle, verified in zip(unpack(message.handles).tolist(), counts, strict=True):
            request = self.tenancy.requests.get(handle)
            if request is not None:
                self._rounds.trim(request, verified)
        self._end_idle_round()

    def verified(self, message: Verified) -> None:
        """Follow what was confirmed and guess what comes next.

        Raises:
            OutOfStepError: the text does not continue what is known of the request.
        """
        self._settle()
        if self._round_began is not None:
            self.counters["draft_rounds_cut"] += 1
            self._end_round(time.perf_counter())
        self.tenancy.frame += 1
        handles = unpack(message.handles).tolist()
        lengths = unpack(message.lengths).tolist()
        confirmed = unpack(message.confirmed_counts).tolist()
        proposed = unpack(message.proposed_counts).tolist()
        tokens = unpack(message.tokens).tolist()
        self._rounds.next_frame(len(handles), any(proposed), message.verify_us * 1e-6)
        for handle in handles:
            # All before the first is followed: none gives way to another of the same frame.
            if handle in self.tenancy.requests:
                self.tenancy.requests[handle].last_used = self.tenancy.frame
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
        if self.has_work:
            self._round_began = time.perf_counter()

    # ---- one step

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something, or one is under way."""
        return self._pipeline.has_work

    def publications(self) -> list[ToTarget]:
        """What changed in the trees since the last call."""
        messages = self._unsent + self.tenancy.publisher.messages()
        self._unsent = []
        return messages

    def step(self) -> list[ToTarget]:
        """Decode every pending row by one token, prefill some, fork where candidates became known.

        Returns:
            What to publish, in order.
        """
        messages = self.publications()
        return messages + self._follow_up(self._pipeline.step())

    def _settle(self) -> None:
        """Take in the step under way before the target's word changes the rows it works on."""
        taken = self._pipeline.settle()
        if taken is not None:
            self._unsent += self._follow_up(taken)

    def _follow_up(self, taken: Taken) -> list[ToTarget]:
        """What to publish of a step; forks where it made candidates known."""
        messages: list[ToTarget] = []
        if len(taken.grown):
            ended = taken.grown[self.rows.cache.ended[taken.grown]]
            messages.append(Stepped(pack(taken.grown), pack(taken.tokens), pack(ended)))
        for request in self.tenancy.requests.values():
            if request.next_k < len(request.forks_wanted):
                self._rounds.fork(request)
        messages += self.tenancy.publisher.messages()
        self._count(taken)
        return messages

    def _count(self, taken: Taken) -> None:
        now = time.perf_counter()
        # A step launched ahead has the device to itself only after the one before.
        seconds = now - max(taken.began, self._counted)
        self._counted = now
        if not taken.prefilled:
            self._clock.observe(taken.decoded, seconds)
        counters = self.counters
        counters["draft_steps"] += 1
        counters["draft_rows"] += taken.decoded
        counters["draft_prefill_tokens"] += taken.prefilled
        counters["draft_step_seconds"] += seconds
        counters["draft_python_seconds"] = (
            counters["draft_step_seconds"] - self._pipeline.model_seconds
        )
        if not self.has_work:
            self._end_round(now)

    def _end_idle_round(self) -> None:
        """End a round that has lost its last branch, or the time until the next would count."""
        if not self.has_work:
            self._end_round(time.perf_counter())

    def _end_round(self, now: float) -> None:
        """A round ends with its last branch, or when the next outcomes cut it off."""
        if self._round_began is not None:
            self.counters["draft_rounds"] += 1
            self.counters["draft_round_seconds"] += now - self._round_began
            self._round_began = None
