"""What the checks of ``vllm-ssd doctor`` find."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple


class Status(StrEnum):
    """How serious a finding is."""

    OK = "ok"
    WARNING = "warning"
    """SSD works, but slowly or not for everything."""
    ERROR = "error"
    """SSD would refuse to start."""


class Finding(NamedTuple):
    """The result of one check."""

    check: str
    status: Status
    found: str
    mend: str = ""


def checked(check: str, call: Callable[[], object], found: str) -> Finding:
    """``found`` if a check passes, else its refusal."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return refused(check, error)
    return Finding(check, Status.OK, found)


def refused(check: str, error: Exception) -> Finding:
    """A refusal of ours: one sentence, the mend behind the last semicolon."""
    found, _, mend = str(error).removeprefix("ssd: ").rpartition("; ")
    return Finding(check, Status.ERROR, found or mend, mend if found else "")
