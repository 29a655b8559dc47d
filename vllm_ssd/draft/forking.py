"""The forks of a round: which outcomes get a row, over all requests at once.

Which outcomes are likely and how many branches pay is decided in :mod:`vllm_ssd.core`; this module
applies it to the choices known for each trunk so far and to the free rows and blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arrays import BoolArray, Float64Array, Int32Array, Int64Array
from vllm_ssd.core.budget import RoundTimes
from vllm_ssd.core.forks import Forks, choose_forks, fork_caps
from vllm_ssd.core.outcomes import OutcomeModel
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
    """The most branches a request can have."""


class _Trunks(NamedTuple):
    """The trunks of B requests as arrays, ``[B]`` each."""

    row: Int32Array
    length: Int64Array
    """Of the confirmed text."""
    verified: Int64Array
    """n, how many tokens after it are being verified."""
    known: Int64Array
    """The choices are known for this many numbers k of accepted tokens, 0 to n + 1."""
    tokens: Int64Array
    """How many tokens the trunk holds after the confirmed text."""
    ended: BoolArray
    limit: Int64Array


class Forking:
    """Forks trunks as soon as the choices for ``t*`` are known.

    Args:
        allocator: the requests and what they hold.
        trees: where the forks are entered.
        policy: what is guessed.
        outcomes: how likely the outcomes are.
        times: the measured times of steps and verifications.
    """

    def __init__(
        self,
        allocator: Allocator,
        trees: Trees,
        policy: Policy,
        outcomes: OutcomeModel,
        times: RoundTimes,
    ) -> None:
        self._allocator = allocator
        self._rows = allocator.rows
        self._trees = trees
        self._policy = policy
        self._outcomes = outcomes
        self._times = times

    def fork(self, requests: Iterable[Request]) -> None:
        """Make the forks whose choices are known by now, the likeliest outcomes of all first.

        Args:
            requests: those that are looked at; the others keep what they have.
        """
        looked_at = [request for request in requests if self._news(request)]
        if not looked_at:
            return
        trunks = self._read(looked_at)
        chances = self._chances(looked_at, trunks)
        forks = self._choose(looked_at, trunks, chances)
        now = forks.k < trunks.known[forks.request]
        all_known = (trunks.known > trunks.verified) | (
            trunks.ended & (trunks.known >= trunks.tokens)
        )
        later = np.where(all_known, 0, np.bincount(forks.request[~now], minlength=len(looked_at)))
        for request, known, left in zip(
            looked_at, trunks.known.tolist(), later.tolist(), strict=True
        ):
            request.next_k, request.forks_open = known, left
        self._make(looked_at, trunks, forks.where(now))

    def _news(self, request: Request) -> bool:
        """Whether choices have become known since the last look, or no more will."""
        if request.trunk == DORMANT or request.forks_open == 0:
            return False
        known = int(self._rows.computed[request.trunk]) - request.length + 1
        if min(known, request.verified + 1) > request.next_k:
            return True
        cache, trunk = self._trees.cache, request.trunk
        return bool(cache.ended[trunk]) and known >= int(cache.length[trunk])

    def _read(self, requests: Sequence[Request]) -> _Trunks:
        row = np.array([request.trunk for request in requests], np.int32)
        length = np.array([request.length for request in requests])
        verified = np.array([request.verified for request in requests])
        known = np.clip(self._rows.computed[row] - length + 1, 0, verified + 1)
        limit = np.array([request.limit for request in requests])
        cache = self._trees.cache
        tokens = cache.length[row].astype(np.int64)
        return _Trunks(row, length, verified, known, tokens, cache.ended[row], limit)

    def _chances(self, requests: Sequence[Request], trunks: _Trunks) -> Float64Array:
        """The chance of each outcome, ``[B, K + 1, C]``; 0 where no fork is to be made (again)."""
        positions = self._policy.num_speculative_tokens + 1
        stated = self._rows.stated[trunks.row, :positions]
        chances = self._outcomes.chances(trunks.verified, trunks.known, stated)
        k = np.arange(positions)
        # Nothing is drafted beyond the limit, and nothing follows an end token.
        beyond = k >= (trunks.limit - trunks.length - 1)[:, None]
        beyond |= trunks.ended[:, None] & (k >= trunks.tokens[:, None])
        chances[beyond] = 0.0
        stop = self._rows.stop[trunks.row]
        if (stop >= 0).any():
            choices = self._rows.choices[trunks.row, :positions]
            ends = (choices[..., None] == stop[:, None, None, :]).any(-1)
            chances[ends & (k < trunks.known[:, None])[..., None]] = 0.0
        made = [(i, *outcome) for i, request in enumerate(requests) for outcome in request.made]
        if made:
            chances[tuple(np.array(made).T)] = 0.0
        return chances

    def _choose(self, requests: Sequence[Request], trunks: _Trunks, chances: Float64Array) -> Forks:
        """The outcomes to guess, those whose choices are not known yet among them."""
        policy = self._policy
        is_open = np.array([request.forks_open for request in requests])
        undecided = is_open == UNDECIDED
        most = np.where(undecided, (policy.branches or policy.max_branches) - 1, is_open)
        worth = None
        if not policy.branches and undecided.any():
            prepared = (trunks.verified > 0).astype(np.int64)
            worth = self._times.worth_of_a_hit(policy.max_branches, self._outcomes.acceptance)
            # The number decided at the first look is kept: after it, more are better.
            more = np.arange(1.0, policy.max_branches + 1.0)
            worth = np.where(undecided[:, None], worth[prepared], more)
        return choose_forks(chances, most, worth, self._caps(requests, trunks))

    def _caps(self, requests: Sequence[Request], trunks: _Trunks) -> Int64Array | None:
        """How many more forks there may be for each k, ``[B, K + 1]``."""
        fan_out = self._policy.fan_out
        if fan_out is None:
            return None
        caps = fork_caps(fan_out, trunks.verified)
        for row, request in zip(caps, requests, strict=True):
            for k, _ in request.made:
                row[k] -= 1
        return caps

    def _make(self, requests: Sequence[Request], trunks: _Trunks, forks: Forks) -> None:
        """Make and publish forks, the likeliest first, as many as there are rows and blocks for."""
        starts = (trunks.length[forks.request] + forks.k).astype(np.int32)
        left = trunks.limit[forks.request] - starts - 1
        room = np.minimum(self._policy.num_speculative_tokens, left).astype(np.int32)
        order = np.argsort(-forks.chance, kind="stable")
        affordable = self._allocator.affordable(starts[order], room[order])
        kept = np.sort(order[:affordable])
        owner, k, choice, chance = forks.where(kept)
        tokens = self._rows.choices[trunks.row[owner], k, choice]
        owners = [requests[i] for i in owner.tolist()]
        made = self._allocator.add_forks(owners, starts[kept], tokens, room[kept], chance)
        for request, its_k, its_choice in zip(owners, k.tolist(), choice.tolist(), strict=True):
            request.made.append((its_k, its_choice))
        self._trees.fork(
            [request.handle for request in requests],
            np.bincount(owner, minlength=len(requests)).tolist(),
            [request.forks_open == 0 for request in requests],
            k.astype(np.int32),
            tokens,
            made,
        )
