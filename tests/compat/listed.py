"""The listed names of vLLM, all lists together."""

from __future__ import annotations

from collections import defaultdict

from vllm_ssd import compat, hooks

LISTS = (
    hooks.TARGET,
    hooks.TARGET_ON_CPU,
    hooks.TARGET_V2,
    hooks.DRAFT,
    *hooks.DRAFT_PLANNING,
)


def listed() -> dict[str, set[str]]:
    """The members of each listed place."""
    found: dict[str, set[str]] = defaultdict(set)
    for names in LISTS:
        for place, entry in names.items():
            found[place] |= {member for member, _ in compat.members(entry)}
    return found
