"""One round of a request: follow what was confirmed, plan the next tree, fork it.

When an outcome arrives the branch that came true becomes the trunk and all other forks are freed;
on a miss the trunk is cut back to the confirmed text. Then new forks are made for the outcomes of
what is being verified now, as soon as the candidates for ``t*`` are known: most are at once, from
the trunk's own decoding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_ssd.core.arrays import Float64Array
from vllm_ssd.core.budget import StepTimeModel, worth_of_a_hit
from vllm_ssd.core.outcomes import OutcomeModel
from vllm_ssd.core.tree import Where
from vllm_ssd.draft.request import DORMANT, Request
from vllm_ssd.draft.tenancy import Tenancy


class Policy(NamedTuple):
    """What is guessed."""

    num_speculative_tokens: int
    fan_out: tuple[int, ...]
    max_branches: int
    """Branches per request, the trunk being one; 0: as many as the step time affords."""
    acceptance: float
    """Until some verifications have been seen, as ``miss_exponent``."""
    miss_exponent: float


_SMOOTHING = 0.2
"""Weight of the newest verification time."""


class Rounds:
    """Plans the trees of all requests.

    Args:
        tenancy: the requests and what they hold.
        policy: what is guessed.
        clock: the measured time of a step.
    """

    def __init__(self, tenancy: Tenancy, policy: Policy, clock: StepTimeModel) -> None:
        self._tenancy = tenancy
        self._rows = tenancy.rows
        self._policy = policy
        self._clock = clock
        self._batch = 1
        """Requests that are drafted for at the moment."""
        self._verifying = False
        """Whether any drafted token is being verified, beside the one that is certain."""
        self._verify_seconds = {False: 0.0, True: 0.0}
        """How long that takes, smoothed: a step without drafts is a good deal shorter."""
        others = int(self._rows.candidates.shape[-1]) - 1
        self._outcomes = OutcomeModel(
            policy.acceptance, policy.miss_exponent, others, policy.fan_out
        )
        self._worth: dict[bool, Float64Array] = {}
        """Of a hit, by whether the candidates are known already; in this frame."""

    def next_frame(self, batch: int, verifying: bool, verify_seconds: float) -> None:
        """The outcomes of a verification are about to be followed.

        Args:
            batch: how many there are.
            verifying: whether drafted tokens are verified next.
            verify_seconds: how long the verification took; 0.0 if that is not known.
        """
        self._worth.clear()
        if verify_seconds:
            before = self._verify_seconds[self._verifying] or verify_seconds
            self._verify_seconds[self._verifying] = before + _SMOOTHING * (verify_seconds - before)
        self._batch, self._verifying = batch, verifying

    def begin(self, request: Request, proposed: list[int]) -> None:
        """Draft for a request that holds nothing yet: after its prompt, or when it comes back."""
        if request.length < request.limit - 1 and self._tenancy.admit(request):
            self._plan(request, proposed)
        else:
            # The target must know, or it would wait for a tree.
            self._tenancy.publisher.withdraw(request.handle)

    def follow(self, request: Request, confirmed: list[int], proposed: list[int]) -> None:
        """Take in an outcome.

        Args:
            request: whose.
            confirmed: its new tokens.
            proposed: the drafted tokens that are verified next.
        """
        tenancy, rows = self._tenancy, self._rows
        if request.trunk == DORMANT:
            request.append(confirmed)
            self.begin(request, proposed)
            return
        self._learn(request, confirmed)
        walk = rows.cache.walk(request.handle, confirmed)
        old_length = request.length
        request.append(confirmed)
        if walk.where is Where.FOUND:
            if walk.row != request.trunk:
                tenancy.adopt(request, walk.row)
            tenancy.drop_forks(request)
            rows.rebase(request.trunk, request.length)
        else:
            tenancy.drop_forks(request)
            kept = min(old_length + walk.offset, int(rows.computed[request.trunk]))
            tenancy.cut_back(request, kept)
        if request.length >= request.limit - 1:
            # Nothing can be drafted for the outcome after this one.
            tenancy.release(request)
            return
        tenancy.share_verified(request)
        self._plan(request, proposed)

    def trim(self, request: Request, verified: int) -> None:
        """Fewer tokens are verified than were proposed: outcomes beyond them cannot happen."""
        if verified >= request.verified:
            return
        request.verified = verified
        request.forks_wanted = request.forks_wanted[: verified + 1]
        last = request.length + verified
        beyond = [row for row in request.forks if self._rows.start[row] > last]
        # The target still knows these rows; they just do not grow any more.
        self._rows.pending[beyond] = False
        self._tenancy.publisher.fork(request, [], [], [])

    def _learn(self, request: Request, confirmed: list[int]) -> None:
        """Take in how a verification ended, where the trunk held what was verified."""
        rows, trunk = self._rows, request.trunk
        accepted = len(confirmed) - 1
        drafted = rows.cache.row_tokens(trunk)
        if request.strayed or accepted > request.verified or drafted[:accepted] != confirmed[:-1]:
            return
        confidence = rows.confidence[trunk, : accepted + 1]
        if int(rows.computed[trunk]) - request.length < accepted:
            # What the draft would have gone on with is not known.
            self._outcomes.observe(confidence[:accepted], accepted)
        elif confirmed[-1] == self._expected(request, accepted, drafted):
            self._outcomes.observe(confidence, accepted + 1)
        else:
            choices = self._choices(request, accepted, drafted, set(request.stop.tolist()))
            last, none = confirmed[-1], rows.candidates.shape[-1]
            rank = choices.index(last) if last in choices else none
            self._outcomes.observe(confidence, accepted, rank)

    def _expected(self, request: Request, k: int, drafted: list[int]) -> int:
        """The trunk's own token after ``k`` others."""
        return drafted[k] if k < len(drafted) else int(self._rows.candidates[request.trunk, k, 0])

    def _choices(self, request: Request, k: int, drafted: list[int], ends: set[int]) -> list[int]:
        """Candidates for ``t*`` after ``k`` trunk tokens, best first, where forks may start.

        The drafted token cannot follow its own rejection, after all n it is the trunk's. Nothing
        follows an end token.
        """
        expected = self._expected(request, k, drafted)
        candidates: list[int] = self._rows.candidates[request.trunk, k].tolist()
        return [token for token in candidates if token != expected and token not in ends]

    def fork(self, request: Request) -> None:
        """Fork off the trunk after every k whose candidates are known by now."""
        rows, trunk = self._rows, request.trunk
        if trunk == DORMANT:
            return
        known = int(rows.computed[trunk]) - request.length
        if known < request.next_k:
            return
        drafted = rows.cache.row_tokens(trunk)
        ends = set(request.stop.tolist())
        k_list: list[int] = []
        tokens: list[int] = []
        last = min(known, len(request.forks_wanted) - 1)
        for k in range(request.next_k, last + 1):
            if request.length + k + 1 >= request.limit:
                break
            choices = self._choices(request, k, drafted, ends)[: request.forks_wanted[k]]
            k_list += [k] * len(choices)
            tokens += choices
        request.next_k = last + 1
        k_array = np.array(k_list, np.int32)
        room = np.minimum(
            self._policy.num_speculative_tokens, request.limit - request.length - k_array - 1
        ).astype(np.int32)
        made = self._tenancy.add_forks(request, k_array, np.array(tokens, np.int32), room)
        count = len(made)
        self._tenancy.publisher.fork(request, k_list[:count], tokens[:count], made)

    def _plan(self, request: Request, proposed: list[int]) -> None:
        """Plant the next tree: how far the trunk grows, how many forks are wanted where."""
        rows, trunk = self._rows, request.trunk
        length = int(rows.cache.length[trunk])
        known = rows.cache.tokens[trunk, : min(length, len(proposed))].tolist()
        # If the trunk does not hold the proposal (it was lost), only its own course is drafted.
        request.strayed = known != proposed
        request.verified = 0 if request.strayed else len(proposed)
        depth = self._policy.num_speculative_tokens
        grow_to = min(len(proposed) + 1 + depth, request.limit - request.length)
        rows.room[trunk] = max(0, grow_to - length)
        if not self._tenancy.cover(request, request.length + max(grow_to, length)):
            self._tenancy.release(request)
            return
        at_rest = not rows.pending[trunk] and request.handle not in self._tenancy.catching_up
        if at_rest and not rows.cache.ended[trunk]:
            rows.resume(trunk)
        request.forks_wanted = self._forks_wanted(request)
        if rows.cache.ended[trunk]:
            # Nothing follows an end token that is accepted.
            del request.forks_wanted[int(rows.cache.length[trunk]) :]
        request.next_k = 0
        self._tenancy.publisher.plant(request)
        self.fork(request)

    def _forks_wanted(self, request: Request) -> list[int]:
        """How many forks to make after k accepted tokens, for k = 0..n."""
        rows, policy, verified = self._rows, self._policy, request.verified
        # Rows for all: those who come first in the batch would take them from the others.
        most = max(1, len(rows.pending) // self._batch)
        if min(most, policy.max_branches or most) == 1:
            return [0] * (verified + 1)
        known = max(0, int(rows.computed[request.trunk]) - request.length + 1)
        confidence = rows.confidence[request.trunk, : min(known, verified + 1)]
        forecast = self._outcomes.forecast(verified, confidence)
        count = policy.max_branches
        if not count:
            worth = self._worth_of_a_hit(prepared=verified > 0)[: len(forecast.hit)]
            count = 1 + int(np.argmax(forecast.hit * worth))
        forks = forecast.accepted[: min(count, most) - 1]
        wanted: list[int] = np.bincount(forks, minlength=verified + 1).tolist()
        return wanted

    def _worth_of_a_hit(self, prepared: bool) -> Float64Array:
        """By the number of branches per request."""
        worth = self._worth.get(prepared)
        if worth is None:
            times = self._verify_seconds
            worth = self._worth[prepared] = worth_of_a_hit(
                1 + sum(self._policy.fan_out),
                self._clock,
                times[self._verifying] or times[not self._verifying],
                self._batch,
                self._policy.num_speculative_tokens,
                self._outcomes.acceptance,
                prepared,
            )
        return worth
