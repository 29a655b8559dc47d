"""What an option takes, and the sentence for the user where it gets something else."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

MAX_SPECULATIVE_TOKENS = 32
MAX_FAN_OUT = 64
MAX_BRANCHES = 1024

NEEDS = {
    "model": "needs a folder or a hub name",
    "fan_out": f"needs 'auto', an integer from 1 to {MAX_FAN_OUT}, a list of "
    f"num_speculative_tokens + 1 integers from 0 to {MAX_FAN_OUT}, not all 0, or "
    "{'geometric': an integer}",
    "branches": f"needs an integer from 1 to {MAX_BRANCHES}, or 'auto'",
    "draft_placement": "needs 'process' or 'ray'",
    "draft_resources": "needs a dictionary: 'num_cpus' and 'num_gpus' (at least 0), 'node' (an IP "
    "or an id), 'bundle' (an index), and amounts of custom resources",
    "draft_name": "needs letters, digits, '.', '_' and '-', 64 at most",
    "draft_device": "needs 'auto', 'cpu', 'cuda' or 'cuda:<index>'",
    "draft_cpu_cores": "needs a list of core numbers",
    "max_wait_ms": "needs milliseconds from 0 to 10,000, or 'auto'",
    "saguaro_c": "needs a number from 0 to 1, or 'auto'",
    "pad_misses": "needs true, false or 'auto'",
    "draft_vocab": "needs a number of tokens, 0 for all, or a file of token ids by frequency",
    "draft_hf_overrides": "needs a dictionary of fields of the draft model's config.json",
}
"""What an option takes, where pydantic's own message would not say it."""

_LEARNED = "it is learned from the verifications; leave it out"
_GONE = {
    "fan_out_policy": "the split by Theorem 12 is fan_out = {'geometric': F} now, the uniform one "
    "fan_out = F",
    "acceptance": f"{_LEARNED} (only the geometric fan-out assumes one: fan_out = "
    "{'geometric': F, 'acceptance': a})",
    "miss_exponent": f"{_LEARNED} (only the geometric fan-out assumes one: fan_out = "
    "{'geometric': F, 'miss_exponent': r})",
}
"""Options of earlier versions, and what has replaced them."""

_OF_GEOMETRIC = ("geometric", "acceptance", "miss_exponent")
"""The entries of ``fan_out = {"geometric": ...}``."""


def explain(error: ValidationError, options: dict[str, Any], known: Collection[str]) -> str:
    """Pydantic's findings as one sentence for each wrong option.

    Args:
        error: pydantic's.
        options: what was given.
        known: the names of all options.
    """
    sentences: dict[str, str] = {}
    inner: dict[str, list[str]] = {}
    for finding in error.errors():
        # A union reports each of its members; the option's name comes first in all of them.
        name = str(finding["loc"][0]) if finding["loc"] else ""
        message = finding["msg"].removeprefix("Value error, ")
        if finding["loc"][1:2] == ("GeometricFanOut",) and isinstance(options[name], dict):
            inner.setdefault(name, []).append(_explain_geometric(finding))
            continue
        if finding["type"] == "extra_forbidden":
            sentence = _unknown(name, known)
        elif finding["type"] == "missing":
            sentence = f"option {name!r} is missing; add it to the speculative config"
        elif name:
            message = NEEDS.get(name, message[0].lower() + message[1:])
            sentence = f"option {name!r} = {options[name]!r}: {message}"
        else:
            sentence = message
        sentences.setdefault(name, sentence)
    # For a dictionary this is more exact than the errors of the union's other members.
    for name, found in inner.items():
        sentences[name] = f"option {name!r} = {options[name]!r}: {' and '.join(found)}"
    return "ssd: " + "; ".join(sentences.values())


def _explain_geometric(finding: ErrorDetails) -> str:
    """What is wrong with one entry of ``fan_out = {"geometric": ...}``."""
    entry = str(finding["loc"][-1])
    if finding["type"] == "missing":
        return f"{entry!r} is missing (an integer from 1 to {MAX_FAN_OUT})"
    if finding["type"] == "extra_forbidden":
        return f"it has no {entry!r}, only {', '.join(map(repr, _OF_GEOMETRIC))}"
    return f"{entry!r}: {finding['msg'][0].lower()}{finding['msg'][1:]}"


def _unknown(name: str, known: Collection[str]) -> str:
    if name in _GONE:
        return f"option {name!r} is gone: {_GONE[name]}"
    similar = get_close_matches(name, known, n=1)
    hint = f" (did you mean {similar[0]!r}?)" if similar else ""
    return f"unknown option {name!r}{hint}; the options are {', '.join(known)}"
