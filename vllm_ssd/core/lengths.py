"""How many of the drafted tokens to verify: those that bring more than they cost.

An engine that makes R tokens a second loses R t tokens by a step that takes t seconds more. So a
token is verified if its chance of being accepted, with all before it, is at least the *price*: R
times the seconds that one more token takes. As R is the rate that this rule has led to, repeating
it leads to the most tokens per second, as Dinkelbach's method does for any ratio.

A verification may take longer than a plain step whatever it is of: then nothing is verified unless
what all tokens bring beyond their price is more than that.

Whether a sampled token is verified may not depend on which token it is. Its own chance and those
before it do not, but the chances of the tokens after it do. The first rule does not look at these;
the second one takes what is usual after each request's first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from vllm_ssd.core.acceptance import Acceptance, Correction


class Verified(NamedTuple):
    """A proposal, verified."""

    stated: Sequence[float]
    """For each token the chance, as the draft stated it, that it is accepted if those before it
    are."""
    accepted: int
    """How many were."""


class Lengths:
    """Chooses how many drafted tokens to verify; learns how far the draft's chances are right."""

    def __init__(self) -> None:
        self.correction = Correction()
        self.onward = Acceptance()
        """Of the tokens after a request's first."""

    def choose(self, stated: Sequence[Sequence[float]], price: float) -> list[int]:
        """How many of each request's drafted tokens to verify, if any are verified at all.

        Args:
            stated: for each request the chances of its tokens, as in :class:`Verified`.
            price: of verifying one more token, in tokens; 0.0 if it is not known.
        """
        least = self.correction.least(price)
        counts: list[int] = []
        for chances in stated:
            reached, count = 1.0, 0
            for chance in chances:
                reached *= chance
                if not reached >= least:
                    break
                count += 1
            counts.append(count)
        return counts

    def pays(self, firsts: Sequence[float], price: float, once: float, depth: int) -> bool:
        """Whether a verification usually brings what it costs beyond the price of its tokens.

        Args:
            firsts: for each request with drafted tokens the chance of the first one.
            price: as above.
            once: what a verification costs besides, in tokens.
            depth: K.
        """
        if once <= 0.0:
            return True
        onward, surplus = self.onward.chance, 0.0
        for first in firsts:
            reached = self.correction.of(first)
            for _ in range(depth):
                if not reached > price:
                    break
                surplus += reached - price
                reached *= onward
            if surplus >= once:
                return True
        return False

    def observe(self, verified: Sequence[Verified]) -> None:
        """Take in proposals that were verified."""
        said: list[float] = []
        came: list[bool] = []
        right = wrong = 0
        for stated, accepted in verified:
            said += accumulate(stated, mul)
            came += [True] * accepted + [False] * (len(stated) - accepted)
            if accepted:
                right += accepted - 1
                wrong += accepted < len(stated)
        self.correction.observe(said, came)
        self.onward.observe(right, wrong)
