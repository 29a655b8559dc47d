"""One round: follow what was confirmed, plan the next trees.

On a hit the fork reached becomes the trunk; on a miss the trunk is cut back to the confirmed text.
All other forks are freed. Then each trunk is planted as the next tree, which grows past the tokens
being verified now; :mod:`vllm_ssd.draft.forking` makes its forks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_ssd.core.arrays import Float32Array
from vllm_ssd.core.outcomes import OutcomeModel
from vllm_ssd.core.tree import Where
from vllm_ssd.draft.allocator import Allocator
from vllm_ssd.draft.request import DORMANT, UNDECIDED, Request
from vllm_ssd.draft.trees import Trees


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
        allocator.drop_forks(request)
        allocator.share_verified(request)

    def _learn(self, requests: Sequence[Request], confirmed: Sequence[list[int]]) -> None:
        """Learn how verifications ended, where the trunk held what was verified."""
        stated: list[Float32Array] = []
        came: list[int] = []
        for request, tokens in zip(requests, confirmed, strict=True):
            rows, trunk, accepted = self._rows, request.trunk, len(tokens) - 1
            if trunk == DORMANT or request.strayed or accepted > request.verified:
                continue
            if self._trees.cache.row_tokens(trunk)[:accepted] != tokens[:-1]:
                continue
            came += [0] * accepted
            # The choices after them may not be known yet.
            known = min(accepted, int(rows.computed[trunk]) - request.length)
            if known == accepted:
                found = np.flatnonzero(rows.choices[trunk, accepted] == tokens[-1])
                came.append(int(found[0]) if found.size else -1)
            stated.append(rows.stated[trunk, : accepted + (known == accepted)])
        if stated:
            self._outcomes.observe(np.concatenate(stated), np.array(came, np.int64))

    # ---- plan

    def plan(self, requests: Sequence[Request], proposed: Sequence[list[int]]) -> None:
        """Plant the next trees.

        Args:
            requests: their owners; new or evicted ones hold nothing yet.
            proposed: the drafted tokens of each that are verified now.
        """
        for request, tokens in zip(requests, proposed, strict=True):
            if not self._plan(request, tokens):
                self._allocator.release(request)
                self._trees.withdraw(request.handle)  # the target must not wait for a tree

    def _plan(self, request: Request, proposed: list[int]) -> bool:
        """Plant one; False if nothing can be drafted for this request now."""
        allocator, rows = self._allocator, self._rows
        if request.length >= request.limit - 1:
            return False  # the next token is the last, and comes from the target itself
        if request.trunk == DORMANT and not allocator.admit(request):
            return False
        trunk, drafted = request.trunk, request.drafted
        # If the trunk does not hold the proposal (its branch is lost), only the trunk's own course
        # is drafted, as if nothing were being verified.
        request.strayed = drafted[: len(proposed)].tolist() != proposed
        request.verified = 0 if request.strayed else len(proposed)
        grow_to = min(len(proposed) + 1 + self._depth, request.limit - request.length)
        rows.room[trunk] = max(0, grow_to - len(drafted))
        if not allocator.cover(request, request.length + max(grow_to, len(drafted))):
            return False
        at_rest = not rows.pending[trunk] and request.handle not in allocator.catching_up
        if at_rest and not request.ended:
            token = rows.resume(trunk, len(drafted))
            if token is not None:
                drafted = np.append(drafted, np.int32(token))
                request.ended = token in request.stop
        self._trees.plant(request.handle, request.length, trunk, drafted, request.ended)
        request.made = []
        request.next_k = 0
        request.forks_open = UNDECIDED
        return True

    def trim(self, request: Request, verified: int) -> None:
        """Fewer tokens are verified than were proposed: outcomes beyond them cannot happen."""
        if verified >= request.verified:
            return
        request.verified = verified
        last = request.length + verified
        beyond = [row for row in request.forks if self._rows.start[row] > last]
        if beyond:
            self._allocator.prune(request, beyond)
        # Their rows and blocks may go to other outcomes.
        request.made = [outcome for outcome in request.made if outcome[0] <= verified]
        if request.forks_open != UNDECIDED:
            request.forks_open += len(beyond)
        request.next_k = 0
