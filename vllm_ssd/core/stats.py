"""Counters of the target side."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from vllm_ssd.core.recent import Recent

MEASURED = ("verify_seconds", "wait_seconds", "draft_step_seconds")
"""What histograms are made of: values of a verification, a wait, a draft step."""


@dataclass(slots=True)
class Stats:
    """What happened at the look-ups; monotonic counters, times in seconds."""

    look_ups: int = 0
    """For one request each, those of requests that could use a draft."""
    hits: int = 0
    first_look_ups: int = 0
    """Look-ups right after a request's prompt, counted in ``look_ups`` too."""
    first_hits: int = 0
    misses_no_branch: int = 0
    """The draft had guessed, but not this outcome."""
    misses_not_ready: int = 0
    """The branch was not drafted yet."""
    misses_resync: int = 0
    """The request had just been announced to the draft again."""
    misses_draft_down: int = 0
    """There was no draft process."""
    misses_cannot_draft: int = 0
    """Of requests that the draft cannot follow, on the V2 runner; not counted in ``look_ups``."""
    tokens_drafted: int = 0
    """Drafted tokens that were verified."""
    tokens_accepted: int = 0
    verifications: int = 0
    """Verifications of at least one drafted token."""
    rejections: int = 0
    """Verifications that rejected a drafted token."""
    depth_at_hit: int = 0
    """Sum over the hits of the tokens found below the outcome."""
    tokens_filled: int = 0
    """Tokens that only filled proposals up to K, as the V2 runner needs them."""
    texts_lost: int = 0
    """Requests not followed any more, on the V2 runner: an error has cost a piece of their text."""
    batches_with_probabilities: int = 0
    """Proposals of a batch in which tokens were sampled, verified by their probabilities."""
    tokens_with_probabilities: int = 0
    """Tokens proposed there that were sampled; the others were certain."""
    batches_too_large: int = 0
    """Such proposals verified as if all tokens were certain: the probabilities would take too much
    memory."""
    tokens_found: int = 0
    """Drafted tokens found below the outcomes."""
    tokens_chosen: int = 0
    """How many of them are verified, because that pays."""
    rounds_full: int = 0
    """Verifications of all that was found, to learn what that takes."""
    rounds_off: int = 0
    """Rounds without speculation, because plain decoding is faster or to see if it is."""
    rounds_probing: int = 0
    """Rounds with speculation where it is usually off, or without where it is usually on."""
    probe_seconds: float = 0.0
    """Time in them."""
    waits: int = 0
    """Proposals that waited for the draft."""
    wait_seconds: float = 0.0
    waits_in_vain: int = 0
    """Waits that ended with a token that did not come in time."""
    waited_tokens: int = 0
    """Tokens got by waiting, among those verified."""
    waited_accepted: int = 0
    waited_rejections: int = 0
    """Verifications that rejected one of these tokens."""
    ngram_proposals: int = 0
    """Proposals of one request each that n-grams of its text made or prolonged."""
    ngram_tokens: int = 0
    """Their tokens from the text, among those verified."""
    ngram_accepted: int = 0
    ngram_rejections: int = 0
    """Verifications that rejected one of these tokens."""
    ngram_seconds: float = 0.0
    """Time to find them."""
    proposals: int = 0
    """Calls of ``propose()``, each for a whole batch."""
    propose_seconds: float = 0.0
    """Time in them, waiting included."""
    verify_seconds: float = 0.0
    """Time from one proposal to the next, while decoding goes on."""
    verify_intervals: int = 0
    notices: int = 0
    """Steps announced to the draft, before the target begins them or right after."""
    notice_seconds: float = 0.0
    """Time in that; where it comes before the launch, the target waits for it."""
    resyncs: int = 0
    restarts: int = 0
    errors: int = 0
    recent: dict[str, Recent] = field(default_factory=lambda: {name: Recent() for name in MEASURED})
    """The newest values of ``MEASURED``, for histograms."""
    depths: list[int] = field(default_factory=list)
    """How many hits found 0, 1, 2, ... tokens."""

    def missed(self, why: Literal["draft_down", "resync"], look_ups: int) -> None:
        """Count look-ups that were not possible."""
        self.look_ups += look_ups
        if why == "draft_down":
            self.misses_draft_down += look_ups
        else:
            self.misses_resync += look_ups

    def hit(self, depth: int) -> None:
        """Count a hit, and the tokens found at it."""
        self.hits += 1
        self.depth_at_hit += depth
        while depth >= len(self.depths):
            self.depths.append(0)
        self.depths[depth] += 1

    def as_dict(self) -> dict[str, float]:
        """All counters, and ratios of them (absent while they would divide by zero)."""
        result: dict[str, float] = {name: getattr(self, name) for name in COUNTERS}
        _ratio(result, "hit_rate", self.hits, self.look_ups)
        _ratio(result, "mean_depth_at_hit", self.depth_at_hit, self.hits)
        _ratio(result, "mean_wait_seconds", self.wait_seconds, self.waits)
        _ratio(result, "mean_propose_seconds", self.propose_seconds, self.proposals)
        _ratio(result, "mean_notice_seconds", self.notice_seconds, self.notices)
        _ratio(result, "mean_verify_seconds", self.verify_seconds, self.verify_intervals)
        return result


COUNTERS = tuple(one.name for one in fields(Stats) if one.name not in ("recent", "depths"))
"""The names of the counters."""


def add_draft_ratios(counters: dict[str, float]) -> dict[str, float]:
    """The draft process's counters with their means."""
    result = dict(counters)
    steps = counters.get("draft_steps", 0)
    _ratio(result, "mean_draft_step_seconds", counters.get("draft_step_seconds", 0.0), steps)
    _ratio(result, "mean_draft_rows", counters.get("draft_rows", 0), steps)
    rounds = counters.get("draft_rounds", 0)
    _ratio(result, "mean_draft_plan_seconds", counters.get("draft_plan_seconds", 0.0), rounds)
    _ratio(result, "mean_draft_round_seconds", counters.get("draft_round_seconds", 0.0), rounds)
    for name, seconds in counters.items():
        # How tokens were drafted above temperature 0 (core/arms.py), and what that yielded.
        if name.startswith("draft_arm_") and name.endswith("_seconds"):
            arm = name.removesuffix("_seconds")
            _ratio(result, f"mean_{arm}_rate", counters.get(f"{arm}_tokens", 0.0), seconds)
    return result


def _ratio(into: dict[str, float], name: str, part: float, whole: float) -> None:
    if whole:
        into[name] = part / whole
