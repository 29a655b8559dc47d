"""A step of the target in plain types: what a front-end says of it, whatever its runner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class EngineRequest(NamedTuple):
    """A request of the engine's that the draft can follow (:func:`requests.can_draft`)."""

    req_id: str
    tokens: Any
    """Its whole confirmed text: a list, or ``[length]`` int32."""
    prompt_length: int
    """How many of them are the prompt."""
    params: Any
    """vLLM's ``SamplingParams``."""


class Decodes(NamedTuple):
    """A step in which every request decodes."""

    requests: int
    drafted: int
    """The drafted tokens that it verifies, padding included."""


class Scheduled(NamedTuple):
    """A step that the scheduler has decided."""

    gone: Sequence[str]
    """Requests that have ended, or have begun anew and cannot be followed by the draft."""
    new: Sequence[EngineRequest]
    """Those that begin, or begin anew."""
    verified: Iterable[tuple[str, int]]
    """For each request of the step, how many of the tokens proposed for it are verified; padding
    counts."""
    decodes: Decodes | None
    """None if some request has prefill tokens."""
