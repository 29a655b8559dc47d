"""One round of a request: follow what was confirmed, plan the next tree, fork it.

On a hit the fork reached becomes the trunk; on a miss the trunk is cut back to the confirmed text.
All other forks are freed. Then forks are made for the likeliest outcomes of what is being verified
now (:mod:`vllm_ssd.core.forks`), as soon as the choices for ``t*`` are known: most are at once,
from the trunk's own decoding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arrays import Float64Array, Int32Array
from vllm_ssd.core.budget import StepTimeModel, worth_of_a_hit
from vllm_ssd.core.forks import Forks, best_count, caps_for, likeliest_forks
from vllm_ssd.core.outcomes import OutcomeModel
from vllm_ssd.core.tree import Where
from vllm_ssd.draft.allocator import Allocator
from vllm_ssd.draft.request import DORMANT, UNDECIDED, Request
from vllm_ssd.draft.trees import Trees


class Policy(NamedTuple):
    """What is guessed."""

    num_speculative_tokens: int
    fan_out: tuple[int, ...] | None
    """The most guesses after each k, ``[K + 1]``; None for no such cap."""
    branches: int
    """Branches per request, the trunk being one; 0: as many as the measured times afford."""
    max_branches: int
    """The most of them."""


class _Wanted(NamedTuple):
    """Forks of one request that can be made now."""

    request: Request
    forks: Forks


_SMOOTHING = 0.2
"""Weight of the newest verification time."""


class Rounds:
    """Plans the trees of all requests.

    Args:
        allocator: the requests and what they hold.
        trees: the trees.
        policy: what is guessed.
        clock: the measured time of a step.
        lookahead: whether the model launches a step while another one is under way.
    """

    def __init__(
        self,
        allocator: Allocator,
        trees: Trees,
        policy: Policy,
        clock: StepTimeModel,
        lookahead: bool,
    ) -> None:
        self._allocator = allocator
        self._rows = allocator.rows
        self._trees = trees
        self._policy = policy
        self._clock = clock
        self._lookahead = lookahead
        self._batch = 1
        """Requests that are drafted for at the moment."""
        self._verifying = False
        """Whether any drafted token is being verified, beside the one that is certain."""
        self._verify_seconds = {False: 0.0, True: 0.0}
        """How long that takes, smoothed: a step without drafts is a good deal shorter."""
        self._outcomes = OutcomeModel(self._rows.choices.shape[-1])
        self._worth: dict[bool, Float64Array] = {}
        """Of a hit, by whether the choices are known already; in this round."""

    def begin(self, batch: int, verifying: bool, verify_seconds: float) -> None:
        """A verification has ended and the next one has begun.

        Args:
            batch: requests in it.
            verifying: whether drafted tokens are verified now.
            verify_seconds: how long the last one took; 0.0 if that is not known.
        """
        self._worth.clear()
        if verify_seconds:
            before = self._verify_seconds[self._verifying] or verify_seconds
            self._verify_seconds[self._verifying] = before + _SMOOTHING * (verify_seconds - before)
        self._batch, self._verifying = batch, verifying
        self._allocator.round += 1

    # ---- follow

    def follow(self, request: Request, confirmed: list[int]) -> None:
        """Take in the outcome of a verification: keep the hit branch, free the others.

        Args:
            request: whose.
            confirmed: its new tokens.
        """
        allocator, rows, cache = self._allocator, self._rows, self._trees.cache
        old_length = request.length
        request.last_used = allocator.round
        if request.trunk == DORMANT:
            request.append(confirmed)
            return
        self._learn(request, confirmed)
        walk = cache.walk(request.handle, confirmed)
        request.append(confirmed)
        if walk.where is Where.FOUND:
            if walk.row != request.trunk:
                allocator.adopt(request, walk.row)
            request.drafted = cache.tokens[walk.row, walk.offset : cache.length[walk.row]].copy()
            request.ended = bool(cache.ended[walk.row])
            rows.rebase(request.trunk, request.length)
        else:
            kept = min(old_length + walk.offset, int(rows.computed[request.trunk]))
            allocator.cut_back(request, kept)
        allocator.drop_forks(request)
        allocator.share_verified(request)

    def _learn(self, request: Request, confirmed: list[int]) -> None:
        """Take in how a verification ended, where the trunk held what was verified."""
        rows, trunk = self._rows, request.trunk
        accepted = len(confirmed) - 1
        drafted = self._trees.cache.row_tokens(trunk)
        if request.strayed or accepted > request.verified or drafted[:accepted] != confirmed[:-1]:
            return
        if int(rows.computed[trunk]) - request.length < accepted:
            # What the draft would have gone on with is not known.
            self._outcomes.observe(rows.stated[trunk, :accepted], accepted)
            return
        stated = rows.stated[trunk, : accepted + 1]
        found = np.flatnonzero(rows.choices[trunk, accepted] == confirmed[-1])
        choice = int(found[0]) if found.size else None
        if choice == 0:
            self._outcomes.observe(stated, accepted + 1)
        else:
            self._outcomes.observe(stated, accepted, choice or 0)

    # ---- plan

    def plan(self, request: Request, proposed: list[int]) -> None:
        """Plant the next tree: how far the trunk grows, how many forks are wanted.

        Args:
            request: whose; it may hold nothing yet, after its prompt or when it comes back.
            proposed: the drafted tokens that are verified now.
        """
        allocator, rows = self._allocator, self._rows
        if request.length >= request.limit - 1:
            # Nothing can be drafted for the outcome after this one.
            self._give_up(request)
            return
        if request.trunk == DORMANT and not allocator.admit(request):
            self._give_up(request)
            return
        trunk, drafted = request.trunk, request.drafted
        # If the trunk does not hold the proposal (it was lost), only its own course is drafted.
        request.strayed = drafted[: len(proposed)].tolist() != proposed
        request.verified = 0 if request.strayed else len(proposed)
        depth = self._policy.num_speculative_tokens
        grow_to = min(len(proposed) + 1 + depth, request.limit - request.length)
        rows.room[trunk] = max(0, grow_to - len(drafted))
        if not allocator.cover(request, request.length + max(grow_to, len(drafted))):
            self._give_up(request)
            return
        at_rest = not rows.pending[trunk] and request.handle not in allocator.catching_up
        if at_rest and not request.ended:
            grown = rows.resume(trunk, len(drafted))
            if grown is not None:
                drafted = np.append(drafted, np.int32(grown))
                request.ended = grown in request.stop
        self._trees.plant(request.handle, request.length, trunk, drafted, request.ended)
        request.made = []
        request.next_k = 0
        request.forks_open = UNDECIDED

    def _give_up(self, request: Request) -> None:
        """Draft nothing for a request; the target must know, or it would wait for a tree."""
        self._allocator.release(request)
        self._trees.withdraw(request.handle)

    def trim(self, request: Request, verified: int) -> None:
        """Fewer tokens are verified than were proposed: outcomes beyond them cannot happen."""
        if verified >= request.verified:
            return
        request.verified = verified
        last = request.length + verified
        beyond = [row for row in request.forks if self._rows.start[row] > last]
        self._allocator.prune(request, beyond)
        request.made = [outcome for outcome in request.made if outcome[0] <= verified]
        if request.forks_open != UNDECIDED:
            request.forks_open += len(beyond)
        request.next_k = 0
        self.fork([request])

    # ---- fork

    def fork(self, requests: Iterable[Request]) -> None:
        """Fork the trunks whose choices for ``t*`` are known by now, likeliest outcomes first.

        Args:
            requests: those that are looked at; the others keep what they have.
        """
        wanted = [
            _Wanted(request, self._wanted(request)) for request in requests if self._news(request)
        ]
        if not wanted:
            return
        chances = np.concatenate([forks.chance for _, forks in wanted])
        owners = np.repeat(np.arange(len(wanted)), [len(forks.k) for _, forks in wanted])
        starts = np.concatenate([request.length + forks.k for request, forks in wanted])
        room = np.concatenate([self._room(request, forks) for request, forks in wanted])
        order = np.argsort(-chances, kind="stable") if len(wanted) > 1 else np.arange(len(chances))
        affordable = self._allocator.affordable(starts[order], room[order])
        kept = np.bincount(owners[order[:affordable]], minlength=len(wanted)).tolist()
        for (request, forks), count in zip(wanted, kept, strict=True):
            self._make(request, forks.first(count))

    def _news(self, request: Request) -> bool:
        """Whether more choices have become known than were looked at, or none will."""
        if request.trunk == DORMANT or request.forks_open == 0:
            return False
        known = self._known(request)
        return known > request.next_k or self._ends_within(request, known)

    def _make(self, request: Request, forks: Forks) -> None:
        """Make forks of one request and publish them."""
        k, choice = forks.k.tolist(), forks.choice.tolist()
        tokens: Int32Array = self._rows.choices[request.trunk, forks.k, forks.choice]
        made: list[int] = []
        if k:
            made = self._allocator.add_forks(
                request,
                (request.length + forks.k).astype(np.int32),
                tokens,
                self._room(request, forks),
                forks.chance,
            )
        request.made += zip(k, choice, strict=True)
        self._trees.fork(request.handle, k, tokens.tolist(), made, request.forks_open == 0)

    def _room(self, request: Request, forks: Forks) -> Int32Array:
        """How many tokens each fork may grow by after its first."""
        left = request.limit - request.length - forks.k - 1
        room: Int32Array = np.minimum(self._policy.num_speculative_tokens, left).astype(np.int32)
        return room

    def _wanted(self, request: Request) -> Forks:
        """The forks that can be made now; those whose choices are not known yet stay open."""
        known = min(self._known(request), request.verified + 1)
        chances = self._chances(request, known)
        undecided = request.forks_open == UNDECIDED
        most = self._policy.max_branches - 1 if undecided else request.forks_open
        forks = likeliest_forks(chances, most, self._caps(request))
        if undecided:
            forks = forks.first(self._count(request, forks, float(chances[-1, 0])))
        now = forks.k < known
        request.next_k = known
        all_known = known > request.verified or self._ends_within(request, known)
        request.forks_open = 0 if all_known else int(len(now) - now.sum())
        return Forks(forks.k[now], forks.choice[now], forks.chance[now])

    def _count(self, request: Request, forks: Forks, own: float) -> int:
        """How many of the likeliest forks to make in this round; ``own``: the trunk's chance."""
        if self._policy.branches:
            return self._policy.branches - 1
        return best_count(forks, own, self._worth_of_a_hit(request.verified > 0))

    def _chances(self, request: Request, known: int) -> Float64Array:
        """Of each outcome; 0 where there is no fork to make (any more)."""
        rows, cache, trunk = self._rows, self._trees.cache, request.trunk
        chances = self._outcomes.chances(request.verified, rows.stated[trunk, :known])
        # Nothing follows an end token, and nothing is drafted beyond the limit.
        ends = request.stop[request.stop >= 0]
        if ends.size:
            chances[:known][np.isin(rows.choices[trunk, :known], ends)] = 0.0
        if cache.ended[trunk]:
            chances[int(cache.length[trunk]) :] = 0.0
        chances[max(0, request.limit - request.length - 1) :] = 0.0
        for k, choice in request.made:
            chances[k, choice] = 0.0
        return chances

    def _known(self, request: Request) -> int:
        """After how many numbers k of accepted tokens the choices are known, from 0 on."""
        return max(0, int(self._rows.computed[request.trunk]) - request.length + 1)

    def _ends_within(self, request: Request, known: int) -> bool:
        """Whether the trunk has ended, so that no more choices will become known."""
        cache, trunk = self._trees.cache, request.trunk
        return bool(cache.ended[trunk]) and known >= int(cache.length[trunk])

    def _caps(self, request: Request) -> tuple[int, ...] | None:
        """What is left of the caps for each k."""
        if self._policy.fan_out is None:
            return None
        caps = list(caps_for(self._policy.fan_out, request.verified))
        for k, _ in request.made:
            caps[k] -= 1
        return tuple(caps)

    def _worth_of_a_hit(self, prepared: bool) -> Float64Array:
        """By the number of branches per request."""
        worth = self._worth.get(prepared)
        if worth is None:
            times = self._verify_seconds
            worth = self._worth[prepared] = worth_of_a_hit(
                self._policy.max_branches,
                self._clock,
                times[self._verifying] or times[not self._verifying],
                self._batch,
                self._policy.num_speculative_tokens,
                self._outcomes.acceptance,
                prepared,
                self._lookahead,
            )
        return worth
