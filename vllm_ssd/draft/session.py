"""One target of the draft: its messages, rounds and trees, and all that is learned about it.

One round reads top to bottom in :meth:`Session.verified`. Per request there is a trunk, which
follows the confirmed text and the tokens being verified, and forks off the trunk, one for each
guessed outcome (:mod:`vllm_ssd.draft.rounds`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from vllm_ssd.core.budget import RoundTimes
from vllm_ssd.core.setting_outcomes import SettingOutcomes
from vllm_ssd.core.tree import row_width
from vllm_ssd.draft.blocks import VerifiedPrefix
from vllm_ssd.draft.drafting import Drafting
from vllm_ssd.draft.forking import Forking, Policy
from vllm_ssd.draft.learning import Learning
from vllm_ssd.draft.request import Request
from vllm_ssd.draft.rounds import Rounds, chances_of
from vllm_ssd.draft.rows import Grown
from vllm_ssd.draft.share import Share
from vllm_ssd.draft.tally import RoundTally
from vllm_ssd.draft.trees import Trees
from vllm_ssd.wire.messages import (
    MAX_STOP_TOKENS,
    Finished,
    Proposed,
    Start,
    ToDraft,
    ToTarget,
    Trimmed,
    Verified,
)
from vllm_ssd.wire.packing import unpack

if TYPE_CHECKING:
    from vllm_ssd.draft.engine import DraftEngine


MAX_REQUESTS = 4096
"""Of a target at once."""


class OutOfStepError(Exception):
    """A message does not fit those before it: a new epoch is needed."""


class StepError(Exception):
    """A step failed while a message waited for its result: the message is not to blame."""


class Session:
    """Drafts for one target; :meth:`vllm_ssd.draft.engine.DraftEngine.open` makes it.

    Args:
        engine: the engine, which other targets may use too.
        index: which of its targets this is.
        policy: which outcomes are guessed.
    """

    def __init__(self, engine: DraftEngine, index: int, policy: Policy) -> None:
        depth = policy.num_speculative_tokens
        self._engine = engine
        self._tally = RoundTally()
        counters = self._tally.counters
        allocator = engine.allocator
        rows = allocator.rows
        self.trees = Trees(len(rows.start), row_width(depth))
        self.share = Share(index, self.trees, counters)
        self._times = RoundTimes(depth, engine.model.lookahead, engine.step_times)
        self._drafting = Drafting(rows.sampled, policy.arms, depth, counters)
        outcomes = SettingOutcomes(rows.choices.shape[-1], self._drafting.settings)
        self._outcomes = outcomes
        self._learning = Learning(rows, self.trees.cache, depth, outcomes)
        self._rounds = Rounds(allocator, self.share, depth, outcomes, self._drafting)
        self._forking = Forking(allocator, self.share, policy, outcomes, self._times)
        self._resting = False
        """Nothing is proposed: no branches are drafted, only the texts are kept."""
        self._steps_before = dict(engine.counters)

    @property
    def counters(self) -> dict[str, float]:
        """Of the engine's steps and of this target's rounds, since it has joined."""
        before = self._steps_before
        steps = {name: count - before[name] for name, count in self._engine.counters.items()}
        return {**steps, **self._tally.counters}

    # ---- messages from the target

    def handle(self, message: ToDraft) -> None:
        """Take in a message, checked already (:mod:`vllm_ssd.draft.validation`).

        Raises:
            OutOfStepError: it does not fit those before it.
        """
        match message:
            case Start():
                self.start(message)
            case Verified():
                self.verified(message)
            case Proposed():
                self.proposed(message)
            case Trimmed():
                self.trimmed(message)
            case Finished():
                self.finished(message)
            case _:
                raise OutOfStepError(f"{type(message).__name__} to a target that is served already")

    def reset(self) -> None:
        """Forget all requests; the KV of verified prefixes stays in the cache."""
        self._engine.abandon()
        self._engine.allocator.forget(self.share)
        self._tally.reset()
        self._resting = False

    def start(self, message: Start) -> None:
        """A new request, or a known one whose text is announced again."""
        self._engine.settle()
        known = self.share.requests.get(message.handle)
        if known is not None:
            self._engine.allocator.remove(known)
        elif len(self.share.requests) >= MAX_REQUESTS:
            raise OutOfStepError(f"more than {MAX_REQUESTS} requests")
        tokens = unpack(message.tokens)
        stop = np.full(MAX_STOP_TOKENS, -1, np.int32)
        ends = message.stop[:MAX_STOP_TOKENS]
        stop[: len(ends)] = ends
        request = Request(
            self.share,
            message.handle,
            tokens.copy(),
            len(tokens),
            message.limit,
            stop,
            VerifiedPrefix(),
        )
        request.temperature = message.temperature
        request.top_k, request.top_p = message.top_k, message.top_p
        self._drafting.begin(request)
        request.last_used = self.share.round
        self.share.requests[message.handle] = request
        if self._resting:
            self._rounds.rest([request])
            self.trees.withdraw(request.handle)  # the target must not wait for a tree
            return
        self._rounds.plan([request], [[]])
        self._forking.fork([request])

    def finished(self, message: Finished) -> None:
        """Free what finished requests hold."""
        self._engine.settle()
        for handle in unpack(message.handles).tolist():
            request = self.share.requests.get(handle)
            if request is not None:
                self._drafting.finished(request)
                self._engine.allocator.remove(request)
        self.end_idle_round()

    def trimmed(self, message: Trimmed) -> None:
        """The scheduler has cut proposals: fewer tokens are verified than were proposed."""
        self._engine.settle()
        counts = unpack(message.verified_counts).tolist()
        for handle, verified in zip(unpack(message.handles).tolist(), counts, strict=True):
            request = self.share.requests.get(handle)
            if request is not None:
                self._rounds.trim(request, verified)
                self._forking.fork([request])
        self.end_idle_round()

    def verified(self, message: Verified) -> None:
        """One round: a verification has ended, and the next one has begun.

        Raises:
            OutOfStepError: the text does not continue what is known of the request.
        """
        self._engine.settle()
        self._tally.cut_round()
        began = time.perf_counter()
        requests, confirmed, proposed = self._unpack(message)
        # While speculation was off, it says nothing of how to draft or how long there is time for.
        seconds = 0.0 if self._resting else message.verify_us * 1e-6
        for_others = message.price * (1.0 - 1.0 / max(1, len(requests)))
        self._drafting.observe(requests, confirmed, seconds, for_others)
        self._learning.read(requests, confirmed)
        if not message.speculate:
            self._rounds.follow(requests, confirmed)
            # Also what others hold: a branch would only take the target's share of the memory.
            self._rounds.rest(requests if self._resting else self.share.requests.values())
            self._resting = True
            return
        self._resting = False
        verifying = any(tokens is None or tokens for tokens in proposed)
        self._times.begin_round(len(requests), verifying, seconds, message.price)
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
        self._engine.settle()
        began = time.perf_counter()
        awaited = self.share.awaited
        handles = unpack(message.handles).tolist()
        if len(set(handles)) < len(handles) or not awaited.keys() >= set(handles):
            raise OutOfStepError("a proposal for a request that is not waited for")
        tokens, at = unpack(message.tokens).tolist(), 0
        proposed: list[list[int]] = []
        for count in unpack(message.counts).tolist():
            proposed.append(tokens[at : at + count])
            at += count
        self._rounds.propose([awaited[handle] for handle in handles], proposed)
        self._forking.fork(self.share.requests.values())
        self._tally.plan(time.perf_counter() - began)
        self.end_idle_round()

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
            request = self.share.requests.get(handle)
            middle = at + n_confirmed
            end = middle + max(0, n_proposed)
            if request is None or request.length != length or end > len(tokens):
                raise OutOfStepError(f"request {handle} at length {length}")
            requests.append(request)
            confirmed.append(tokens[at:middle])
            proposed.append(tokens[middle:end] if n_proposed >= 0 else None)
            at = end
        return requests, confirmed, proposed

    # ---- the engine's steps

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something for this target."""
        return self._engine.has_work_for(self.share)

    def publications(self) -> list[ToTarget]:
        """What changed in the trees since the last call."""
        return self.trees.take_messages()

    def learn(self) -> None:
        """Learn from the last verifications, while the device is busy."""
        self._learning.learn()

    def observe_others(self, rows: int) -> None:
        """Take in how many rows a step decoded for other targets."""
        self._times.observe_others(rows)

    def grow(self, grown: Grown) -> None:
        """Grow the trees by a step, in which these rows of the target grew."""
        self.trees.step(grown, chances_of(self._outcomes, grown))

    def fork(self) -> None:
        """Make forks where choices have become known."""
        self._forking.fork(self.share.requests.values())

    def end_idle_round(self) -> None:
        """End a round that has lost its last branch, so that idle time is not counted."""
        if self._tally.in_round and not self.has_work:
            self._tally.end_round()
