"""A target and a draft engine without processes: messages travel when the test says so.

The target's side does what the plugin does (published trees, look-up by content, notices); the
draft's side is the real engine over vLLM's real block pool, with :class:`ToyModel` as its model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tests.draft.toy_model import LookaheadToyModel, ToyModel, best_tokens, greedy
from vllm_ssd.core.arms import arms_of
from vllm_ssd.core.stats import Stats
from vllm_ssd.core.tree import Below
from vllm_ssd.draft.blocks import KVBlocks
from vllm_ssd.draft.engine import DraftEngine
from vllm_ssd.draft.forking import Policy
from vllm_ssd.draft.rows import Rows
from vllm_ssd.target.lookup import LookUp, answer
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.target.requests import Tracked, most_drafts
from vllm_ssd.wire.messages import (
    Finished,
    Forked,
    Planted,
    Proposed,
    Pruned,
    Ready,
    Start,
    Stepped,
    ToDraft,
    ToTarget,
    Trimmed,
    Verified,
)
from vllm_ssd.wire.packing import pack, unpack, unpack_floats


class Sizes(NamedTuple):
    """How big everything is; by default nothing runs short."""

    depth: int = 3
    fan_out: tuple[int, ...] | None = (2, 2, 2, 2)
    branches: int = 0
    vocab_size: int = 12
    num_blocks: int = 400
    block_size: int = 4
    max_rows: int = 64
    max_length: int = 64
    prefill_chunk: int = 4
    prefill_chunk_idle: int = 16
    caching: bool = True
    lookahead: bool = False
    sampled_from: int = 6
    sampling: str = "probabilistic"
    saguaro_c: float = 1.0

    @property
    def max_branches(self) -> int:
        """As the options derive it from the other two."""
        most = sum(self.fan_out) if self.fan_out else 8
        return min(self.branches, most) if self.branches else most


@dataclass
class TargetRequest:
    """A request as the target sees it."""

    handle: int
    text: list[int]
    limit: int
    stop: list[int]
    told: int
    """How much of the text was sent to the draft."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    row: int = -1
    """Where the proposal was found."""
    proposed: list[int] = field(default_factory=list)
    verifying: int = 0
    over: bool = False
    """It has ended; the draft may not have the message yet."""
    waits: bool = False
    """The target waits for more of its trunk; it has not decided what it proposes."""
    others: list[tuple[int, list[int]]] = field(default_factory=list)
    """Proposals that are not the draft's alone, with the length of the text before each."""

    def follows(self, text: list[int]) -> bool:
        """Whether a text of it ends with a token from such a proposal."""
        return any(
            0 < len(text) - length <= len(tokens)
            and text[length:] == tokens[: len(text) - length]
            and text[:length] == self.text[:length]
            for length, tokens in self.others
        )


class Simulation:
    """One target, and a draft that it may share.

    Args:
        sizes: how big everything is.
        beside: another target, whose draft this one shares: its rows and blocks are not in
            ``sizes`` then, and its K is not smaller.
    """

    def __init__(
        self,
        sizes: Sizes = Sizes(),  # noqa: B008 (immutable)
        beside: Simulation | None = None,
    ) -> None:
        self.sizes = sizes
        candidates = min(sizes.max_branches + 1, sizes.vocab_size)
        model_class = LookaheadToyModel if sizes.lookahead else ToyModel
        sampled_from = min(sizes.sampled_from, sizes.vocab_size)
        self.model: Any
        self.blocks: KVBlocks
        self.rows: Rows
        self.engine: DraftEngine
        if beside is not None:
            self.model, self.blocks, self.rows = beside.model, beside.blocks, beside.rows
            self.engine = beside.engine
        else:
            self.model = model_class(
                sizes.num_blocks, sizes.block_size, sizes.vocab_size, candidates, sampled_from
            )
            self.blocks = KVBlocks(sizes.num_blocks, sizes.block_size, sizes.caching)
            self.rows = Rows(sizes.max_rows, sizes.depth, candidates, sampled_from)
            self.engine = DraftEngine(
                self.model, self.rows, self.blocks, sizes.prefill_chunk, sizes.prefill_chunk_idle
            )
        self.session = self.engine.open(
            Policy(
                sizes.depth,
                sizes.fan_out,
                sizes.branches,
                sizes.max_branches,
                arms_of(sizes.sampling, sizes.saguaro_c),
            )
        )
        self.together: list[Simulation] = [] if beside is None else beside.together
        """All targets of the draft."""
        self.together.append(self)
        self.cache = self.session.trees.cache
        self.published = PublishedTrees(sizes.depth, sizes.vocab_size, sampled_from)
        self.published.start(Ready(len(self.rows.start), sizes.num_blocks, sizes.block_size))
        self.requests: dict[int, TargetRequest] = {}
        """All requests that were announced and not reported as finished."""
        self.to_draft: deque[list[ToDraft]] = deque()
        self.to_target: deque[list[ToTarget]] = deque()
        self.verify_us = 0
        """The verification time that the target reports; 0: unknown."""
        self.drawn_from: dict[tuple[int, int], dict[int, float]] = {}
        """By row and position of published tokens: the q' of those that were sampled."""
        self.chances: dict[tuple[int, int], float] = {}
        """By row and position of published tokens: the chance stated for each."""
        self.hits = 0
        """For the test's own counting."""
        self._next_handle = 0

    # ---- the target

    def start(
        self,
        prompt: Sequence[int],
        max_tokens: int = 100,
        stop: Sequence[int] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> TargetRequest:
        """A new request."""
        limit = min(len(prompt) + max_tokens, self.sizes.max_length) - 1
        sampling = temperature, top_k, top_p
        return self._announce(list(prompt), limit, list(stop), *sampling)

    def _announce(
        self,
        text: list[int],
        limit: int,
        stop: list[int],
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> TargetRequest:
        sampling = temperature, top_k, top_p
        request = TargetRequest(self._next_handle, text, limit, stop, len(text), *sampling)
        self._next_handle += 1
        self.requests[request.handle] = request
        self.published.announce(request.handle)
        self.to_draft.append([Start(request.handle, pack(text), limit, stop, *sampling)])
        return request

    def confirm(self, request: TargetRequest, accepted: int, token: int) -> None:
        """Verification accepts so many of the proposed tokens and emits ``token`` after them."""
        assert accepted <= request.verifying
        request.text += [*request.proposed[:accepted], token]
        new = request.text[-accepted - 1 :]
        request.over = len(request.text) > request.limit or bool(set(new) & set(request.stop))

    def propose(
        self,
        requests: Iterable[TargetRequest],
        waits: Sequence[TargetRequest] = (),
        more: Mapping[int, list[int]] = {},
        speculate: bool = True,
    ) -> None:
        """Look up what follows the confirmed texts, and send the draft the outcomes.

        Args:
            requests: those verified.
            waits: those of them that the target waits for.
            more: by handle, tokens that prolong what is found.
            speculate: if not, nothing is looked up, and the draft only keeps the texts.
        """
        handles: list[int] = []
        lengths: list[int] = []
        confirmed: list[int] = []
        proposed: list[int] = []
        tokens: list[int] = []
        for request in requests:
            tracked = Tracked(request.handle, request.told, request.limit)
            length = len(request.text)
            wanted = most_drafts(tracked, length, self.sizes.depth) if speculate else 0
            below = self.look_up(request)
            request.row = below.row
            request.waits = request in waits
            if not request.waits:
                answer([LookUp(0, tracked, [], length, wanted, below)], Stats())
            request.proposed, request.verifying = tracked.proposed, tracked.verifying
            if request.handle in more and not request.waits:
                tokens_of_it = [*request.proposed, *more[request.handle]][: max(0, wanted)]
                self._set_proposal(request, tokens_of_it)
            handles.append(request.handle)
            lengths.append(request.told)
            confirmed.append(len(request.text) - request.told)
            proposed.append(-1 if request.waits else len(request.proposed))
            tokens += request.text[request.told :] + request.proposed
            request.told = len(request.text)
        message = Verified(
            pack(handles),
            pack(lengths),
            pack(confirmed),
            pack(proposed),
            pack(tokens),
            self.verify_us,
            speculate,
        )
        self.to_draft.append([message])

    def _set_proposal(self, request: TargetRequest, tokens: list[int]) -> None:
        request.proposed, request.verifying = tokens, len(tokens)
        request.others.append((len(request.text), tokens))

    def decide(self, proposals: Mapping[int, list[int]]) -> None:
        """The target has waited; this is what it proposes, by handle."""
        tokens: list[int] = []
        for handle, proposed in proposals.items():
            request = self.requests[handle]
            assert request.waits
            request.waits = False
            self._set_proposal(request, proposed)
            tokens += proposed
        counts = [len(proposed) for proposed in proposals.values()]
        self.to_draft.append([Proposed(pack(list(proposals)), pack(counts), pack(tokens))])

    def look_up(self, request: TargetRequest) -> Below:
        """Look a request's text up in its tree, however old the tree is; either way to do it."""
        cache = self.published.cache
        tree = cache.trees.get(request.handle)
        new = request.text[tree.base :] if tree is not None else []
        ways = (cache.look_up, cache.look_up_many)
        (below,) = ways[len(request.text) % 2]([request.handle], [new])
        return below

    def verify(self, request: TargetRequest, accepted: int, token: int) -> list[int]:
        """One verification and the look-up after it; the new proposal."""
        self.confirm(request, accepted, token)
        self.propose([request])
        return request.proposed

    def trim(self, request: TargetRequest, verified: int) -> None:
        """Fewer tokens than were proposed will be verified."""
        request.verifying = verified
        self.to_draft.append([Trimmed(pack([request.handle]), pack([verified]))])

    def finish(self, requests: Sequence[TargetRequest]) -> None:
        """Requests have finished."""
        handles = [request.handle for request in requests]
        for handle in handles:
            del self.requests[handle]
            self.published.drop(handle)
        self.to_draft.append([Finished(pack(handles))])

    def resync(self) -> None:
        """A new epoch: what is on its way is lost, all live requests are announced anew."""
        self.to_draft.clear()
        self.to_target.clear()
        self.published.clear()
        self.session.reset()
        live = [request for request in self.requests.values() if not request.over]
        self.requests.clear()
        for request in live:
            sampling = request.temperature, request.top_k, request.top_p
            self._announce(request.text, request.limit, request.stop, *sampling)

    def greedy(self, request: TargetRequest, count: int) -> list[int]:
        """The draft model's own continuation of a request's text."""
        return greedy(request.text, self.sizes.vocab_size, count)

    def greedy_after(self, text: list[int], count: int) -> list[int]:
        """The draft model's own continuation of a text."""
        return greedy(text, self.sizes.vocab_size, count)

    def best(self, text: list[int]) -> list[int]:
        """The draft model's next tokens after a text, best first."""
        return best_tokens(text, self.sizes.vocab_size, self.sizes.vocab_size)

    # ---- the draft, as its server drives it

    def draft_receives(self, frames: int = 1) -> None:
        """The draft takes frames in and publishes what they change."""
        for _ in range(min(frames, len(self.to_draft))):
            for message in self.to_draft.popleft():
                self.session.handle(message)
        self._publish()

    def draft_steps(self, steps: int = 1) -> None:
        """The draft decodes."""
        for _ in range(steps):
            if self.engine.has_work:
                self.engine.step()
                self._publish()

    def _publish(self) -> None:
        for sim in self.together:
            sim.to_target.append(sim.session.publications())

    def leave(self) -> None:
        """The target is gone."""
        self.together.remove(self)
        self.engine.close(self.session)

    # ---- the target's side of the channel

    def target_receives(self, frames: int = 1) -> None:
        """The target takes publications in."""
        for _ in range(min(frames, len(self.to_target))):
            for message in self.to_target.popleft():
                match message:
                    case Planted():
                        self.published.plant(message)
                    case Forked():
                        self.published.fork(message)
                    case Pruned():
                        self.published.prune(message)
                    case Stepped():
                        self._note(message)
                        self.published.steps([message])

    def _note(self, message: Stepped) -> None:
        """Note the chance and the q' of each token that rows are about to grow by."""
        cache, rows = self.published.cache, unpack(message.rows)
        positions = (cache.start[rows] + cache.length[rows]).tolist()
        places = list(zip(rows.tolist(), positions, strict=True))
        self.chances.update(zip(places, unpack_floats(message.chances).tolist(), strict=True))
        for place in places:
            self.drawn_from.pop(place, None)
        if not message.sampled:
            return
        sampled = unpack(message.sampled).tolist()
        ends = np.cumsum(unpack(message.supports))[:-1]
        tokens = np.split(unpack(message.q_tokens), ends)
        q = np.split(unpack_floats(message.q_probabilities), ends)
        for i, of, share in zip(sampled, tokens, q, strict=True):
            held = dict(zip(of.tolist(), share.tolist(), strict=True))
            assert len(held) == len(of), "a token twice"
            self.drawn_from[places[i]] = held

    def deliver(self) -> None:
        """Everything under way arrives; nothing is decoded."""
        self.draft_receives(len(self.to_draft))
        self.target_receives(len(self.to_target))

    def settle(self) -> None:
        """Everything arrives and the draft works until it has nothing to do."""
        self.deliver()
        for _ in range(1000):
            if not self.engine.has_work:
                self.target_receives(len(self.to_target))
                return
            self.draft_steps()
        raise AssertionError("the draft never comes to rest")
