"""Look-up and answer: what the draft has decoded below each request's new tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vllm_ssd.core.stats import Stats
from vllm_ssd.core.tree import NOWHERE, Below, Where
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.target.requests import Origin, RequestTable, Tracked, most_drafts


class Batch(NamedTuple):
    """The result of one verification, for every row of the engine's batch."""

    req_ids: Sequence[str]
    sampled: list[list[int]]
    """The accepted tokens and the one after them; empty where nothing was sampled."""
    lengths: list[int]
    """Length of each text with them."""
    texts: np.ndarray[Any, Any]
    """``[rows, max_model_len]`` int32."""


@dataclass(slots=True)
class LookUp:
    """One request of the batch that has not finished."""

    row: int
    """Its row in the batch."""
    request: Tracked
    confirmed: list[int]
    """Its tokens since the last message to the draft."""
    length: int
    """Length of its text now."""
    wanted: int
    """How many drafted tokens it can use."""
    below: Below = NOWHERE
    """What has been found so far."""
    chosen: int = sys.maxsize
    """How many of the tokens found are proposed at most: more do not pay."""
    before: Below | None = None
    """What had been found when the target began to wait for more; None if it does not wait."""

    def prolong(self, tokens: list[int]) -> int:
        """Add tokens of the request's own text to its proposal, as far as none ends it.

        Returns:
            How many were added.
        """
        request = self.request
        ends = [at for at, token in enumerate(tokens) if token in request.ends]
        tokens = tokens[: ends[0]] if ends else tokens
        if tokens:
            origin = request.origin or Origin(len(request.proposed), 0, 0)
            request.origin = origin._replace(ngram=len(tokens))
            request.proposed = request.proposed + tokens
            request.verifying = len(request.proposed)
        return len(tokens)


def choose(
    batch: Batch, requests: RequestTable, depth: int, stats: Stats
) -> tuple[list[LookUp], list[int]]:
    """Which requests to look up; counts what verification accepted of their last drafts.

    Args:
        batch: the verification.
        requests: those announced to the draft.
        depth: K.
        stats: counters to keep.

    Returns:
        The look-ups, and the rows of requests that must be announced again.
    """
    look_ups: list[LookUp] = []
    unknown: list[int] = []
    verifications = drafted = accepted = whole = 0
    find = requests.get
    rows = zip(batch.req_ids, batch.sampled, batch.lengths, strict=False)
    for row, (req_id, tokens, length) in enumerate(rows):
        if not tokens:
            continue
        request = find(req_id)
        if request is None or length <= request.length:
            unknown.append(row)
            continue
        if request.verifying:
            verifications += 1
            drafted += request.verifying
            right = min(len(tokens) - 1, request.verifying)
            accepted += right
            whole += right == request.verifying
            if request.origin is not None:
                of_text = count_backup(request.origin, request.verifying, right, stats)
                request.of_text.observe(*of_text)
        if not request.ends.isdisjoint(tokens):
            # It has finished; the scheduler will notice next.
            request.proposed, request.verifying = [], 0
            continue
        confirmed = tokens
        if request.length + len(tokens) != length:
            # Some earlier round was not sent to the draft.
            confirmed = batch.texts[row, request.length : length].tolist()
        wanted = most_drafts(request, length, depth)
        look_ups.append(LookUp(row, request, confirmed, length, wanted))
    stats.verifications += verifications
    stats.rejections += verifications - whole
    stats.tokens_drafted += drafted
    stats.tokens_accepted += accepted
    return look_ups, unknown


def look_up(look_ups: Sequence[LookUp], batch: Batch, published: PublishedTrees) -> None:
    """Walk the new tokens down the requests' trees."""
    trees = published.cache.trees
    handles, texts = [], []
    for each in look_ups:
        request = each.request
        tree = trees.get(request.handle)
        handles.append(request.handle)
        if tree is None or tree.base == request.length:
            texts.append(each.confirmed)
        else:
            # The draft is a round behind: the tokens since its tree was planted are walked again.
            texts.append(batch.texts[each.row, tree.base : each.length].tolist())
    for each, below in zip(look_ups, published.cache.look_up(handles, texts), strict=True):
        each.below = below


def lacking(look_ups: Iterable[LookUp]) -> list[LookUp]:
    """Those that could use more tokens than were found."""
    return [
        each for each in look_ups if len(each.below.drafted) < each.wanted and not each.below.ended
    ]


def growing(look_ups: Iterable[LookUp], published: PublishedTrees, depth: int) -> list[LookUp]:
    """Those for which the draft is still working on a better answer."""
    return [each for each in look_ups if _may_grow(each, published, depth)]


def _may_grow(each: LookUp, published: PublishedTrees, depth: int) -> bool:
    request, below = each.request, each.below
    if each.wanted <= 0 or request.handle in published.withdrawn:
        return False
    tree = published.cache.trees.get(request.handle)
    behind = tree is None or tree.base < request.length
    if below.where is not Where.FOUND:
        return behind or below.where is Where.PENDING
    if len(below.drafted) >= each.wanted or below.ended:
        return False
    # A row that has reached its planned length grows only with the next tree.
    is_trunk = tree is not None and below.row == tree.trunk
    length = int(published.cache.length[below.row])
    return behind or length <= depth + is_trunk * len(request.proposed)


def answer(look_ups: Sequence[LookUp], stats: Stats) -> None:
    """Decide each request's next proposal; counts hits and misses.

    An end token is never proposed: that gains nothing, since the same verification yields it
    without that, as its bonus token. And it would count as computed, which matters when more input
    is streamed to the request: vLLM goes on from what is computed.
    """
    hits = 0
    for each in look_ups:
        request, below = each.request, each.below
        request.look_ups += 1
        found: list[int] = []
        if each.wanted > 0:
            found = below.drafted[: each.wanted]
            ended = below.ended
            if ended and len(found) == len(below.drafted):
                del found[-1:]
            if not request.ends.isdisjoint(found):
                # The draft checks only the first few of a request's end tokens.
                ended = True
                del found[next(at for at, token in enumerate(found) if token in request.ends) :]
            if found and each.before is None and request.look_ups > 1:
                hits += 1
                stats.hit(len(found))
            else:
                _count(each, len(found), bool(found) or ended, stats)
            del found[each.chosen :]
        request.proposed, request.verifying = found, len(found)
        request.origin = None
        if each.before is not None:
            at_once = min(len(each.before.drafted), len(found))
            request.origin = Origin(at_once, len(found) - at_once, 0)
    stats.look_ups += hits


def count_backup(origin: Origin, verified: int, accepted: int, stats: Stats) -> tuple[int, int]:
    """Count what was accepted of tokens that were not found at once.

    Returns:
        Of those from the text, how many were accepted, and how many rejected.
    """
    waited = min(max(0, verified - origin.found), origin.waited)
    stats.waited_tokens += waited
    stats.waited_accepted += min(max(0, accepted - origin.found), waited)
    stats.waited_rejections += origin.found <= accepted < origin.found + waited
    if not origin.ngram:
        return 0, 0
    ours = origin.found + origin.waited
    tokens, right = max(0, verified - ours), max(0, accepted - ours)
    stats.ngram_tokens += tokens
    stats.ngram_accepted += right
    rejected = int(ours <= accepted < verified)
    stats.ngram_rejections += rejected
    return right, rejected


def _count(each: LookUp, depth: int, hit: bool, stats: Stats) -> None:
    """Count one look-up; :func:`answer` counts plain hits itself, all at once."""
    request, below = each.request, each.below
    if each.before is not None and each.before.where is not Where.FOUND:
        below, hit = each.before, False  # whatever came of waiting
    stats.look_ups += 1
    first = request.look_ups == 1 and not request.resynced
    if first:
        stats.first_look_ups += 1
        stats.first_hits += hit
    if hit:
        stats.hit(depth)
    elif below.where is Where.OFF:
        stats.misses_no_branch += 1
    elif request.look_ups == 1 and request.resynced:
        stats.misses_resync += 1
    else:
        stats.misses_not_ready += 1
