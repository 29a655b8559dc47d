"""The draft's engine: takes the target's messages, decodes all branches in one batch, publishes.

Per request there is a trunk, which follows the confirmed text and the tokens being verified, and
forks off the trunk, one for each guessed outcome (:mod:`vllm_ssd.draft.rounds`). All rows of all
requests are decoded together, one token a step, and every step is published at once. One round
reads top to bottom in :meth:`DraftEngine.verified`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from vllm_ssd.core.arrays import Float32Array
from vllm_ssd.core.budget import RoundTimes
from vllm_ssd.core.setting_outcomes import SettingOutcomes
from vllm_ssd.core.tree import row_width
from vllm_ssd.draft.allocator import Allocator
from vllm_ssd.draft.blocks import KVBlocks, VerifiedPrefix
from vllm_ssd.draft.drafting import Drafting
from vllm_ssd.draft.forking import Forking, Policy
from vllm_ssd.draft.learning import Learning
from vllm_ssd.draft.model import DraftModel
from vllm_ssd.draft.pipeline import Pipeline, Taken
from vllm_ssd.draft.request import Request
from vllm_ssd.draft.rounds import Rounds, chances_of
from vllm_ssd.draft.rows import Rows
from vllm_ssd.draft.tally import Tally
from vllm_ssd.draft.trees import Trees
from vllm_ssd.wire.messages import (
    MAX_STOP_TOKENS,
    Finished,
    Proposed,
    Start,
    ToTarget,
    Trimmed,
    Verified,
    unpack,
)


class OutOfStepError(Exception):
    """A message does not fit those before it: a new epoch is needed."""


class DraftEngine:
    """Requests and rounds over one draft model.

    Args:
        model: the draft model.
        rows: the rows of its batch.
        blocks: the blocks of its KV cache.
        policy: which outcomes are guessed.
        prefill_chunk: most prompt tokens per step while other requests decode.
        prefill_chunk_idle: the same while none does.
        interrupted: whether a message from the target waits for the step under way.
    """

    def __init__(
        self,
        model: DraftModel,
        rows: Rows,
        blocks: KVBlocks,
        policy: Policy,
        prefill_chunk: int,
        prefill_chunk_idle: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        depth = policy.num_speculative_tokens
        self.model = model
        self._tally = Tally()
        counters = self.counters = self._tally.counters
        self.trees = Trees(len(rows.start), row_width(depth))
        self.allocator = Allocator(rows, blocks, self.trees, counters)
        self._times = RoundTimes(depth, model.lookahead)
        self._drafting = Drafting(rows.sampled, policy.arms, depth, counters)
        outcomes = SettingOutcomes(rows.choices.shape[-1], self._drafting.settings)
        self._outcomes = outcomes
        self._learning = Learning(rows, self.trees.cache, depth, outcomes)
        self._rounds = Rounds(self.allocator, self.trees, depth, outcomes, self._drafting)
        self._forking = Forking(self.allocator, self.trees, policy, outcomes, self._times)
        self._pipeline = Pipeline(
            model, self.allocator, prefill_chunk, prefill_chunk_idle, interrupted
        )
        self._resting = False
        """Nothing is proposed: no branches are drafted, only the texts are kept."""

    # ---- messages from the target

    def take_step_seconds(self) -> Float32Array:
        """The times of the decode steps since the last call."""
        return self._tally.take_step_seconds()

    def reset(self) -> None:
        """Forget all requests; the KV of verified prefixes stays in the cache."""
        self._pipeline.abandon()
        self.allocator.reset()
        self._tally.reset()
        self._resting = False

    def start(self, message: Start) -> None:
        """A new request, or a known one whose text is announced again."""
        self._settle()
        known = self.allocator.requests.get(message.handle)
        if known is not None:
            self.allocator.remove(known)
        tokens = unpack(message.tokens)
        stop = np.full(MAX_STOP_TOKENS, -1, np.int32)
        ends = message.stop[:MAX_STOP_TOKENS]
        stop[: len(ends)] = ends
        request = Request(
            message.handle, tokens.copy(), len(tokens), message.limit, stop, VerifiedPrefix()
        )
        request.temperature = message.temperature
        request.top_k, request.top_p = message.top_k, message.top_p
        self._drafting.begin(request)
        request.last_used = self.allocator.round
        self.allocator.requests[message.handle] = request
        if self._resting:
            self._rounds.rest([request])
            self.trees.withdraw(request.handle)  # the target must not wait for a tree
            return
        self._rounds.plan([request], [[]])
        self._forking.fork([request])

    def finished(self, message: Finished) -> None:
        """Free what finished requests hold."""
        self._settle()
        for handle in unpack(message.handles).tolist():
            request = self.allocator.requests.get(handle)
            if request is not None:
                self._drafting.finished(request)
                self.allocator.remove(request)
        self._end_idle_round()

    def trimmed(self, message: Trimmed) -> None:
        """The scheduler has cut proposals: fewer tokens are verified than were proposed."""
        self._settle()
        counts = unpack(message.verified_counts).tolist()
        for handle, verified in zip(unpack(message.handles).tolist(), counts, strict=True):
            request = self.allocator.requests.get(handle)
            if request is not None:
                self._rounds.trim(request, verified)
                self._forking.fork([request])
        self._end_idle_round()

    def verified(self, message: Verified) -> None:
        """One round: a verification has ended, and the next one has begun.

        Raises:
            OutOfStepError: the text does not continue what is known of the request.
        """
        self._settle()
        self._tally.cut_round()
        began = time.perf_counter()
        requests, confirmed, proposed = self._unpack(message)
        # A verification without drafts, since speculation is off, says nothing of how to draft.
        verify_seconds = 0.0 if self._resting else message.verify_us * 1e-6
        self._drafting.observe(requests, confirmed, verify_seconds, message.price)
        self._learning.read(requests, confirmed)
        if not message.speculate:
            self._rounds.follow(requests, confirmed)
            # Also what others hold: a branch would only take the target's share of the memory.
            self._rounds.rest(requests if self._resting else self.allocator.requests.values())
            self._resting = True
            return
        self._resting = False
        verifying = any(tokens is None or tokens for tokens in proposed)
        self._times.begin_round(len(requests), verifying, message.verify_us * 1e-6)
        self._rounds.follow(requests, confirmed)
        self._rounds.plan(requests, proposed)
        self._forking.fork(requests)
        seconds = time.perf_counter() - began
        self._times.observe_plan(seconds)
        self._tally.plan(seconds)
        if self.has_work:
            self._tally.begin_round(began)

    def proposed(self, message: Proposed) -> None:
        """The target has decided what it verifies of the requests that it waited for.

        Raises:
            OutOfStepError: it did not say that it waits for them.
        """
        self._settle()
        began = time.perf_counter()
        awaited = self.allocator.awaited
        handles = unpack(message.handles).tolist()
        if len(set(handles)) < len(handles) or not awaited.keys() >= set(handles):
            raise OutOfStepError("a proposal for a request that is not waited for")
        tokens, at = unpack(message.tokens).tolist(), 0
        proposed: list[list[int]] = []
        for count in unpack(message.counts).tolist():
            proposed.append(tokens[at : at + count])
            at += count
        self._rounds.propose([awaited[handle] for handle in handles], proposed)
        self._forking.fork(self.allocator.requests.values())
        self._tally.plan(time.perf_counter() - began)
        self._end_idle_round()

    def _unpack(
        self, message: Verified
    ) -> tuple[list[Request], list[list[int]], list[list[int] | None]]:
        """The requests of a verification, their confirmed tokens and what is proposed for each."""
        requests: list[Request] = []
        confirmed: list[list[int]] = []
        proposed: list[list[int] | None] = []
        tokens, handles = unpack(message.tokens).tolist(), unpack(message.handles).tolist()
        if len(set(handles)) < len(handles):
            raise OutOfStepError("a request twice in one verification")
        at = 0
        for handle, length, n_confirmed, n_proposed in zip(
            handles,
            unpack(message.lengths).tolist(),
            unpack(message.confirmed_counts).tolist(),
            unpack(message.proposed_counts).tolist(),
            strict=True,
        ):
            request = self.allocator.requests.get(handle)
            middle = at + n_confirmed
            end = middle + max(0, n_proposed)
            if request is None or request.length != length or end > len(tokens):
                raise OutOfStepError(f"request {handle} at length {length}")
            requests.append(request)
            confirmed.append(tokens[at:middle])
            proposed.append(tokens[middle:end] if n_proposed >= 0 else None)
            at = end
        return requests, confirmed, proposed

    # ---- one step

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something, or one is under way."""
        return self._pipeline.has_work

    def publications(self) -> list[ToTarget]:
        """What changed in the trees since the last call."""
        return self.trees.take_messages()

    def step(self) -> list[ToTarget]:
        """Decode every pending row by one token, prefill some, fork where choices became known.

        Returns:
            What to publish, in order.
        """
        self._pipeline.launch()
        if not self.allocator.awaited:  # where launches compute, learning would keep the target
            self._learning.learn()
        self._follow_up(self._pipeline.take())
        return self.publications()

    def _settle(self) -> None:
        """Finish the step in flight before a message modifies its rows."""
        taken = self._pipeline.settle()
        if taken is not None:
            self._follow_up(taken)

    def _follow_up(self, taken: Taken) -> None:
        """Grow the trees by a step; fork where it made choices known."""
        self.trees.step(taken.grown, chances_of(self._outcomes, taken.grown))
        self._forking.fork(self.allocator.requests.values())
        seconds = self._tally.step(taken, self._pipeline.model_seconds)
        if not taken.prefilled:
            self._times.steps.observe(taken.decoded, seconds)
        self._end_idle_round()

    def _end_idle_round(self) -> None:
        """End a round that has lost its last branch, so that idle time is not counted."""
        if not self.has_work:
            self._tally.end_round()
