"""One round: follow what was confirmed, plan the next trees.

On a hit the fork reached becomes the trunk; on a miss the trunk is cut back to the confirmed text.
All other forks are freed. Then each trunk is planted as the next tree, which grows past the tokens
being verified now; :mod:`vllm_ssd.draft.forking` makes its forks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from vllm_ssd.core.outcomes import OutcomeModel
from vllm_ssd.core.tree import Where
from vllm_ssd.draft.allocator import Allocator
from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.trees import Trees

KEEP_UP_TOKENS = 16
"""While nothing is drafted, a trunk follows its text in chunks of so many tokens or more."""


class Rounds:
    """Follows outcomes and plants the trees of all requests.

    Args:
        allocator: the requests and what they hold.
        trees: the trees.
        num_speculative_tokens: K.
        outcomes: learns from every outcome.
    """

    def __init__(
        self,
        allocator: Allocator,
        trees: Trees,
        num_speculative_tokens: int,
        outcomes: OutcomeModel,
    ) -> None:
        self._allocator = allocator
        self._rows = allocator.rows
        self._trees = trees
        self._depth = num_speculative_tokens
        self._outcomes = outcomes

    # ---- follow

    def follow(self, requests: Sequence[Request], confirmed: Sequence[list[int]]) -> None:
        """Take in outcomes: keep each hit branch, free the others. Takes no rows and no blocks.

        Args:
            requests: those verified.
            confirmed: the new tokens of each.
        """
        self._allocator.round += 1
        self._learn(requests, confirmed)
        for request, tokens in zip(requests, confirmed, strict=True):
            request.last_used = self._allocator.round
            if request.trunk == DORMANT:
                request.append(tokens)
            else:
                self._follow(request, tokens)
        self._allocator.drop_forks(requests)

    def _follow(self, request: Request, confirmed: list[int]) -> None:
        allocator, rows, cache = self._allocator, self._rows, self._trees.cache
        old_length = request.length
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
        allocator.share_verified(request)

    def _learn(self, requests: Sequence[Request], confirmed: Sequence[list[int]]) -> None:
        """Learn how verifications ended, where the trunk held what was verified."""
        rows, cache = self._rows, self._trees.cache
        known = [
            (request, tokens)
            for request, tokens in zip(requests, confirmed, strict=True)
            if request.trunk != DORMANT
            and not request.strayed
            and 0 < len(tokens) <= request.verified + 1
        ]
        if not known:
            return
        trunk = np.array([request.trunk for request, _ in known])
        accepted = np.array([len(tokens) - 1 for _, tokens in known])
        last = np.array([tokens[-1] for _, tokens in known])
        length = np.array([request.length for request, _ in known])
        k = np.arange(self._depth + 1)
        # [requests, K + 1]: the first choices that were accepted, and the choice that came then.
        right = k < accepted[:, None]
        came = np.zeros(right.shape, np.int64)
        choices = rows.choices[trunk, accepted] == last[:, None]
        came[np.arange(len(known)), accepted] = np.where(
            choices.any(axis=1), choices.argmax(axis=1), -1
        )
        # What the draft would choose after the accepted tokens may not be known yet.
        prepared = rows.computed[trunk] - length >= accepted
        seen = right | ((k == accepted[:, None]) & prepared[:, None])
        held = (
            np.concatenate([tokens[:-1] for _, tokens in known])
            == (cache.tokens[trunk, : self._depth + 1][right])
        )
        strayed = np.bincount(np.nonzero(right)[0], ~held, len(known)) > 0
        seen &= ~strayed[:, None]
        self._outcomes.observe(rows.stated[trunk, : self._depth + 1][seen], came[seen])

    # ---- plan

    def plan(self, requests: Sequence[Request], proposed: Sequence[list[int]]) -> None:
        """Plant the next trees.

        Args:
            requests: their owners; new or evicted ones hold nothing yet.
            proposed: the drafted tokens of each that are verified now.
        """
        planned: list[Request] = []
        for request, tokens in zip(requests, proposed, strict=True):
            if self._prepare(request, tokens):
                planned.append(request)
            else:
                self._allocator.release(request)
                self._trees.withdraw(request.handle)  # the target must not wait for a tree
        for request in planned:
            self._trees.plant(
                request.handle, request.length, request.trunk, request.drafted, request.ended
            )
            request.made = {}
            request.next_k = 0
            request.complete = False
        self._resume(planned)

    def _prepare(self, request: Request, proposed: list[int]) -> bool:
        """Give a trunk what it needs to grow; False if nothing can be drafted now."""
        allocator, rows = self._allocator, self._rows
        if request.length >= request.limit - 1:
            return False  # the next token is the last, and comes from the target itself
        if request.trunk == DORMANT and not allocator.admit(request):
            return False
        held = len(request.drafted)
        # If the trunk does not hold the proposal (its branch is lost), only the trunk's own course
        # is drafted, as if nothing were being verified.
        request.strayed = request.drafted[: len(proposed)].tolist() != proposed
        request.verified = 0 if request.strayed else len(proposed)
        grow_to = min(len(proposed) + 1 + self._depth, request.limit - request.length)
        rows.room[request.trunk] = max(0, grow_to - held)
        return allocator.cover(request, request.length + max(grow_to, held))

    # ---- rest

    def rest(self, requests: Iterable[Request]) -> None:
        """Nothing is drafted for these: they hold their trunks, which follow the texts in chunks.

        Args:
            requests: those; what is confirmed of them has been followed.
        """
        for request in requests:
            self._rest(request)

    def _rest(self, request: Request) -> None:
        allocator, rows = self._allocator, self._rows
        if request.forks:
            allocator.drop_forks([request])
        if request.handle in self._trees.cache.trees:
            self._trees.withdraw(request.handle)
        request.verified, request.strayed = 0, False
        request.complete = True  # no forks
        if request.length >= request.limit - 1:
            allocator.release(request)
            return
        if request.trunk == DORMANT and not allocator.admit(request):
            return
        trunk = request.trunk
        rows.pending[trunk], rows.room[trunk] = False, 0
        missing = request.length - int(rows.computed[trunk])
        if missing < KEEP_UP_TOKENS:
            allocator.catching_up.pop(request.handle, None)
        elif allocator.cover(request, request.length):
            allocator.catching_up[request.handle] = request
        else:
            allocator.release(request)

    def _resume(self, requests: Sequence[Request]) -> None:
        """Let idle trunks grow again: they have more room now."""
        rows = self._rows
        resting = [
            request
            for request in requests
            if not request.ended
            and not rows.pending[request.trunk]
            and request.handle not in self._allocator.catching_up
        ]
        if not resting:
            return
        trunks = np.array([request.trunk for request in resting], np.int32)
        lengths = np.array([len(request.drafted) for request in resting], np.int32)
        grown = rows.resume(trunks, lengths)
        self._trees.step(grown, self._outcomes.acceptance_of(grown.stated))

    def trim(self, request: Request, verified: int) -> None:
        """Fewer tokens are verified than were proposed: outcomes beyond them cannot happen."""
        if verified >= request.verified:
            return
        request.verified = verified
        last = request.length + verified
        beyond = [row for row in request.forks if self._rows.start[row] > last]
        if beyond:
            self._allocator.prune(request, beyond)
        # Their rows and blocks are for outcomes that can still happen.
        request.next_k, request.complete = 0, False
