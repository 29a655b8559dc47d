"""One round: follow what was confirmed, plan the next trees.

On a hit the fork reached becomes the trunk; on a miss the trunk is cut back to the confirmed text.
All other forks are freed. Then each trunk is planted as the next tree, which grows past the tokens
being verified now; :mod:`vllm_ssd.draft.forking` makes its forks. If other tokens are verified than
the trunk holds, it follows them: they are forced on it, one a step, and the choices after each of
them become known as always.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from vllm_ssd.core.arrays import Float32Array, Int32Array
from vllm_ssd.core.setting_outcomes import SettingOutcomes
from vllm_ssd.core.tree import Where
from vllm_ssd.draft.allocator import Allocator
from vllm_ssd.draft.drafting import Drafting
from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.rows import Grown
from vllm_ssd.draft.share import Share

KEEP_UP_TOKENS = 16
"""While nothing is drafted, a trunk follows its text in chunks of so many tokens or more."""


class Rounds:
    """Follows outcomes and plants the trees of a target's requests.

    Args:
        allocator: what requests hold.
        share: the target's requests and their trees.
        num_speculative_tokens: K.
        outcomes: how likely tokens are to be accepted.
        drafting: how the trunks draft.
    """

    def __init__(
        self,
        allocator: Allocator,
        share: Share,
        num_speculative_tokens: int,
        outcomes: SettingOutcomes,
        drafting: Drafting,
    ) -> None:
        self._allocator = allocator
        self._rows = allocator.rows
        self._share = share
        self._trees = share.trees
        self._depth = num_speculative_tokens
        self._outcomes = outcomes
        self._drafting = drafting

    # ---- follow

    def follow(self, requests: Sequence[Request], confirmed: Sequence[list[int]]) -> None:
        """Take in outcomes: keep each hit branch, free the others. Takes no rows and no blocks.

        Args:
            requests: those verified.
            confirmed: the new tokens of each.
        """
        self._share.round += 1
        self._share.awaited.clear()
        for request, tokens in zip(requests, confirmed, strict=True):
            request.last_used = self._share.round
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

    # ---- plan

    def plan(self, requests: Sequence[Request], proposed: Sequence[list[int] | None]) -> None:
        """Plant the next trees.

        Args:
            requests: their owners; new or evicted ones hold nothing yet.
            proposed: the drafted tokens of each that are verified now; None where the target waits
                for more of the trunk (:meth:`propose` follows).
        """
        planned: list[Request] = []
        for request, tokens in zip(requests, proposed, strict=True):
            if self._prepare(request, tokens):
                planned.append(request)
            else:
                self._refuse(request)
        for request in planned:
            self._plant(request)
        self._resume(planned)

    def propose(self, requests: Sequence[Request], proposed: Sequence[list[int]]) -> None:
        """What is verified of requests that the target has waited for is known now.

        Args:
            requests: those.
            proposed: the drafted tokens of each; they need not be the trunk's.
        """
        cache = self._trees.cache
        planned: list[Request] = []
        for request, tokens in zip(requests, proposed, strict=True):
            del self._share.awaited[request.handle]
            if request.trunk == DORMANT:
                continue
            held = int(cache.length[request.trunk])
            request.drafted = cache.tokens[request.trunk, :held].copy()
            request.ended = bool(cache.ended[request.trunk])
            if not self._go_on(request, tokens):
                self._refuse(request)
                continue
            planned.append(request)
            if len(request.drafted) < held:
                self._plant(request)
        self._resume(planned)

    def _plant(self, request: Request) -> None:
        self._trees.plant(
            request.handle, request.length, request.trunk, request.drafted, request.ended
        )
        request.made = {}
        request.next_k = 0
        request.complete = False

    def _refuse(self, request: Request) -> None:
        """Nothing can be drafted for a request: the target must not wait for a tree."""
        self._allocator.release(request)
        self._trees.withdraw(request.handle)

    def _prepare(self, request: Request, proposed: list[int] | None) -> bool:
        """Give a trunk what it needs to grow; False if nothing can be drafted now."""
        allocator, rows = self._allocator, self._rows
        request.verified = 0 if proposed is None else len(proposed)
        if proposed is None:
            self._share.awaited[request.handle] = request
        if request.length >= request.limit - 1:
            return False  # the next token is the last, and comes from the target itself
        if request.trunk == DORMANT and not allocator.admit(request):
            return False
        if proposed is not None:
            return self._go_on(request, proposed)
        # Whatever it grows by may be proposed: the guess that came true is its last verified token.
        self._drafting.set_row(request, request.length - 1)
        grow_to = min(self._depth, request.limit - request.length)
        rows.room[request.trunk] = max(0, grow_to - len(request.drafted))
        return allocator.cover(request, request.length + max(grow_to, len(request.drafted)))

    def _go_on(self, request: Request, proposed: list[int]) -> bool:
        """Have a trunk follow what is proposed and go on from there; False if it finds no blocks.

        Tokens of it that are not what is proposed are cut off.
        """
        held = len(request.drafted)
        request.prepared = int(self._rows.computed[request.trunk]) >= request.length
        kept = _common_prefix(request.drafted, proposed)
        if kept == held and request.ended:
            proposed = proposed[:kept]  # nothing follows an end token
        cut = kept < min(held, len(proposed))
        if cut:
            request.drafted, request.ended = request.drafted[:kept], False
        request.verified = len(proposed)
        if kept < len(proposed):
            request.forced = True
            self._rows.force(request.trunk, kept, proposed[kept:], cut)
        held = len(request.drafted)
        grow_to = min(len(proposed) + 1 + self._depth, request.limit - request.length)
        self._rows.room[request.trunk] = max(0, grow_to - held)
        self._drafting.set_row(request, request.length + len(proposed))
        return self._allocator.cover(request, request.length + max(grow_to, held))

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
        request.verified = 0
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
            allocator.catching_up.pop(request, None)
        elif allocator.cover(request, request.length):
            allocator.catching_up[request] = None
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
            and request not in self._allocator.catching_up
        ]
        if not resting:
            return
        trunks = np.array([request.trunk for request in resting], np.int32)
        lengths = np.array([len(request.drafted) for request in resting], np.int32)
        grown = rows.resume(trunks, lengths)
        self._trees.step(grown, chances_of(self._outcomes, grown))

    def trim(self, request: Request, verified: int) -> None:
        """Fewer tokens are verified than were proposed: outcomes beyond them cannot happen."""
        if verified >= request.verified:
            return
        request.verified = verified
        if request.trunk != DORMANT:
            self._rows.sampled.guess_at[request.trunk] = request.length + verified
            self._rows.forced[request.trunk, verified:] = -1
        last = request.length + verified
        beyond = [row for row in request.forks if self._rows.start[row] > last]
        if beyond:
            self._allocator.prune(request, beyond)
        # Their rows and blocks are for outcomes that can still happen.
        request.next_k, request.complete = 0, False


def chances_of(outcomes: SettingOutcomes, grown: Grown) -> Float32Array:
    """The chance that the target accepts each token that rows grew by."""
    return outcomes.acceptance_of(grown.setting, grown.stated, grown.sampled, grown.likeliest)


def _common_prefix(drafted: Int32Array, proposed: list[int]) -> int:
    """How many leading tokens agree."""
    for at, (ours, theirs) in enumerate(zip(drafted.tolist(), proposed, strict=False)):
        if ours != theirs:
            return at
    return min(len(drafted), len(proposed))
