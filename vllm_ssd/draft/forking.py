"""The forks of a round: which outcomes get a row, over all requests at once.

Which outcomes are likely and how many branches pay is decided in :mod:`vllm_ssd.core`; this module
applies it to the choices known for each trunk so far and to the free rows and blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arms import Arm, arms_of
from vllm_ssd.core.arrays import BoolArray, Float64Array, Int32Array, Int64Array
from vllm_ssd.core.budget import RoundTimes
from vllm_ssd.core.forks import Forks, choose_forks, fork_caps
from vllm_ssd.core.setting_outcomes import SettingOutcomes
from vllm_ssd.draft.allocator import Allocator
from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.share import Share
from vllm_ssd.draft.verifications import ends, read_verifications


class Policy(NamedTuple):
    """What is guessed."""

    num_speculative_tokens: int
    fan_out: tuple[int, ...] | None
    """The most guesses after each k, ``[K + 1]``; None for no such cap."""
    branches: int
    """Branches per request, the trunk being one; 0: as many as the measured times afford."""
    max_branches: int
    """The most branches a request can have."""
    arms: tuple[Arm, ...] = arms_of("greedy", 1.0)
    """The ways to draft above temperature 0."""


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
    forced: bool
    """Whether any of them may hold tokens that were forced on it."""


class Forking:
    """Forks a target's trunks as soon as the choices for ``t*`` are known.

    Args:
        allocator: what requests hold.
        share: the target's requests, and the trees where the forks are entered.
        policy: what is guessed.
        outcomes: how likely the outcomes are.
        times: the measured times of steps and verifications.
    """

    def __init__(
        self,
        allocator: Allocator,
        share: Share,
        policy: Policy,
        outcomes: SettingOutcomes,
        times: RoundTimes,
    ) -> None:
        self._allocator = allocator
        self._rows = allocator.rows
        self._share = share
        self._trees = share.trees
        self._policy = policy
        self._outcomes = outcomes
        self._times = times

    def fork(self, requests: Iterable[Request]) -> None:
        """Make the forks whose choices are known by now, the likeliest outcomes of all first.

        None while the target waits for a trunk.

        Args:
            requests: those that are looked at; the others keep what they have.
        """
        if self._share.awaited:
            return
        looked_at = [request for request in requests if self._news(request)]
        if not looked_at:
            return
        trunks = self._read(looked_at)
        forks = self._choose(looked_at, trunks)
        all_known = (trunks.known > trunks.verified) | (
            trunks.ended & (trunks.known >= trunks.tokens)
        )
        for request, known, complete in zip(
            looked_at, trunks.known.tolist(), all_known.tolist(), strict=True
        ):
            request.next_k, request.complete = known, complete
        self._make(looked_at, trunks, forks)

    def _news(self, request: Request) -> bool:
        """Whether choices have become known since the last look, or no more will."""
        if request.trunk == DORMANT or request.complete:
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
        forced = any(request.forced for request in requests)
        return _Trunks(row, length, verified, known, tokens, cache.ended[row], limit, forced)

    def _chances(self, trunks: _Trunks) -> tuple[Float64Array, Float64Array]:
        """The chance of each outcome, ``[B, K + 1, C]``, 0 where no fork is to be made; and that of
        each trunk's own outcome, ``[B]``."""
        positions = self._policy.num_speculative_tokens + 1
        read = read_verifications(
            self._rows,
            self._trees.cache,
            trunks.row,
            trunks.verified,
            trunks.known,
            positions,
            trunks.forced,
        )
        chances = self._outcomes.chances(read)
        k = np.arange(positions)
        # Nothing is drafted beyond the limit, and nothing follows an end token.
        beyond = k >= (trunks.limit - trunks.length - 1)[:, None]
        beyond |= trunks.ended[:, None] & (k >= trunks.tokens[:, None])
        chances[beyond] = 0.0
        stop = self._rows.stop[trunks.row]
        if (stop >= 0).any():
            ending = ends(self._rows.choices[trunks.row, :positions], stop)
            chances[ending & (k < trunks.known[:, None])[..., None]] = 0.0
        after_all = np.arange(len(trunks.row)), trunks.verified
        choice = read.choice[after_all]
        its_own = *after_all, np.maximum(choice, 0)
        own = np.where(choice >= 0, chances[its_own], 0.0)
        chances[its_own] = np.where(choice >= 0, 0.0, chances[its_own])
        return chances, own

    def _choose(self, requests: Sequence[Request], trunks: _Trunks) -> Forks:
        """The forks to make now.

        At each look the likeliest outcomes are chosen anew, with all that is known by then: a
        position that proves doubtful takes rows from one that is not. Outcomes whose choices are
        not known yet wait for the next look.
        """
        policy = self._policy
        most = np.full(len(requests), (policy.branches or policy.max_branches) - 1)
        worth = caps = None
        if not policy.branches:
            prepared = np.array([request.prepared for request in requests], np.int64)
            worth = self._times.worth_of_a_hit(policy.max_branches, self._outcomes.acceptance)
            worth = worth[prepared]
        if policy.fan_out is not None:
            caps = fork_caps(policy.fan_out, trunks.verified)
        chances, own = self._chances(trunks)
        forks = choose_forks(chances, most, worth, caps, own)
        new = forks.k < trunks.known[forks.request]
        if any(request.made for request in requests):
            chosen = list(zip(*(held.tolist() for held in forks[:3]), strict=True))
            self._give_up_others(requests, set(chosen))
            new &= np.array([(k, c) not in requests[i].made for i, k, c in chosen], np.bool_)
        return forks.where(new)

    def _give_up_others(
        self, requests: Sequence[Request], chosen: set[tuple[int, int, int]]
    ) -> None:
        """Free the forks whose outcomes are not among the likeliest any more."""
        for i, request in enumerate(requests):
            others = [row for outcome, row in request.made.items() if (i, *outcome) not in chosen]
            if others:
                self._allocator.give_up(request, others)

    def _make(self, requests: Sequence[Request], trunks: _Trunks, forks: Forks) -> None:
        """Make and publish forks, the likeliest first, as many as there are rows and blocks for."""
        starts = (trunks.length[forks.request] + forks.k).astype(np.int32)
        left = trunks.limit[forks.request] - starts - 1
        room = np.minimum(self._policy.num_speculative_tokens, left).astype(np.int32)
        order = np.argsort(-forks.chance, kind="stable")
        affordable = self._allocator.affordable(self._share, starts[order], room[order])
        kept = np.sort(order[:affordable])
        owner, k, choice, chance = forks.where(kept)
        tokens = self._rows.choices[trunks.row[owner], k, choice]
        owners = [requests[i] for i in owner.tolist()]
        made = self._allocator.add_forks(owners, starts[kept], tokens, room[kept], chance)
        self._share.counters["draft_forks"] += len(made)
        outcomes = zip(k.tolist(), choice.tolist(), strict=True)
        for request, outcome, row in zip(owners, outcomes, made.tolist(), strict=True):
            request.made[outcome] = row
        self._trees.fork(
            [request.handle for request in requests],
            np.bincount(owner, minlength=len(requests)).tolist(),
            [request.complete for request in requests],
            k.astype(np.int32),
            tokens,
            made,
        )
