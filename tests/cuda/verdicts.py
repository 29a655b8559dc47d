"""What a check says: passed, failed or skipped, with figures; and the table of them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple


class Outcome(StrEnum):
    """How a check has ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


class Verdict(NamedTuple):
    """The result of one check."""

    check: str
    outcome: Outcome
    figures: Sequence[str] = ()
    reason: str = ""
    """Why it failed or was skipped: the first line for the table, all of it below."""


class NotPassedError(Exception):
    """A check ends in another way than by passing.

    Args:
        reason: one sentence, then perhaps more lines.
        figures: what was found all the same.
    """

    outcome: Outcome

    def __init__(self, reason: str, figures: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.reason, self.figures = reason, figures


class SkippedError(NotPassedError):
    """It does not apply here."""

    outcome = Outcome.SKIPPED


class FailedError(NotPassedError):
    """It has found something wrong."""

    outcome = Outcome.FAILED


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as a table in Markdown, and below it the reasons that take more than a line."""
    lines = ["| check | | figures |", "|---|---|---|"]
    for verdict in verdicts:
        first = verdict.reason.partition("\n")[0]
        cells = [verdict.check, f"**{verdict.outcome}**" if first else str(verdict.outcome)]
        said = "; ".join([*([first] if first else []), *verdict.figures])
        lines.append(f"| {' | '.join([*cells, said.replace('|', '/')])} |")
    for verdict in verdicts:
        if "\n" in verdict.reason.strip():
            lines += ["", f"<details><summary>{verdict.check}</summary>", ""]
            lines += ["```", verdict.reason.strip(), "```", "", "</details>"]
    return "\n".join(lines)
