"""The text is the target's, and drafts are found and accepted."""

from __future__ import annotations

from tests.cuda.engines import Found, ratio
from tests.cuda.runs import DEPTH, Runs
from tests.cuda.verdicts import FailedError

_TROUBLE = ("errors", "resyncs", "restarts", "misses_draft_down")


def check_identity(runs: Runs) -> list[str]:
    """SSD answers greedily, in float32, what vLLM alone does."""
    plain, ssd = runs.plain_exact(), runs.ssd_exact()
    return compare(plain, ssd, _how(runs, ssd))


def compare(plain: Found, ssd: Found, how: list[str]) -> list[str]:
    """The figures of two engines whose answers must be the same."""
    different = difference(plain.answers, ssd.answers)
    tokens = sum(map(len, plain.answers))
    figures = [f"{len(plain.answers)} answers, {tokens} tokens", *how]
    if different:
        raise FailedError(different, figures)
    return [*figures, "identical"]


def difference(expected: list[list[int]], found: list[list[int]]) -> str:
    """Where answers differ first; empty where they do not."""
    for number, (want, have) in enumerate(zip(expected, found, strict=True)):
        for at, (a, b) in enumerate(zip(want, have, strict=False)):
            if a != b:
                return f"answer {number} differs from token {at} on: {b} in place of {a}"
        if len(want) != len(have):
            return f"answer {number} has {len(have)} tokens in place of {len(want)}"
    return ""


def _how(runs: Runs, found: Found) -> list[str]:
    invariant = runs.machine.has_cuda and runs.machine.has_batch_invariance
    how = [found.dtype, found.attention, f"graphs {found.graphs}"]
    return [*how, "VLLM_BATCH_INVARIANT=1"] if invariant else how


def check_drafts(runs: Runs) -> list[str]:
    """Look-ups hit, drafted tokens are accepted, and nothing has gone wrong."""
    counters = runs.ssd_exact().counters
    hits, length = ratio(counters, "hits", "look_ups"), ratio(counters, "accepted_tokens", "drafts")
    figures = [
        f"{hits:.0%} of {counters['look_ups']:.0f} look-ups hit",
        f"acceptance length {1 + length:.2f}, K = {DEPTH}",
        f"mean depth at a hit {ratio(counters, 'depth_at_hit', 'hits'):.2f}",
    ]
    trouble = [f"{name} = {counters[name]:.0f}" for name in _TROUBLE if counters[name]]
    if trouble:
        raise FailedError(", ".join(trouble), figures)
    if not counters["hits"] or not counters["tokens_accepted"]:
        raise FailedError("nothing was found, or nothing of it accepted", figures)
    return figures
