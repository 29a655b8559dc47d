"""Failures of the draft: when it is started again, and what the log is told."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.vllm_ssd")

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 60.0
"""Before a process is started again, which takes cores and memory from the others."""
LONGEST_REJOIN_SECONDS = 1.0
"""Before the next attempt to reach a server, which costs a thread of ours next to nothing."""
LOG_AGAIN_SECONDS = 60.0
"""The same failure is logged once in this time."""
STABLE_SECONDS = 60.0
"""A draft that was up for this long starts the back-off anew."""


class Failures:
    """Counts failures one after another. Times are in seconds of one clock.

    Args:
        longest_backoff: between two starts.
    """

    def __init__(self, longest_backoff: float) -> None:
        self.reason = ""
        """Why the draft was lost: the first thing that went wrong since its start."""
        self._longest_backoff = longest_backoff
        self._in_a_row = 0
        self._logged = ("", 0.0)
        """The failure last logged, and when."""

    def forget(self) -> None:
        """The next failure is the first."""
        self._in_a_row = 0

    def count(self, reason: str, up_for: float) -> float:
        """The draft is lost.

        Args:
            reason: why.
            up_for: how long it was up; 0.0 if it was not.

        Returns:
            For how long not to start it again.
        """
        self.reason = self.reason or reason
        self._in_a_row = 1 if up_for > STABLE_SECONDS else self._in_a_row + 1
        doubled = 2 ** min(self._in_a_row - 1, 10)
        return min(FIRST_BACKOFF_SECONDS * doubled, self._longest_backoff)

    def log(self, draft: str, was_up: bool, backoff: float, now: float) -> None:
        """Log this failure, unless the same one was logged just now.

        Args:
            draft: its name.
            was_up: it had come up, which is always worth a line.
            backoff: for how long it is not started again.
            now: the time.
        """
        known, logged_at = self._logged
        if was_up or now - logged_at > LOG_AGAIN_SECONDS or self.reason != known:
            self._logged = self.reason, now
            logger.warning(
                "ssd: %s %s: %s; decoding plainly, next start in %.1f s",
                draft,
                "lost" if was_up else "not reached",
                self.reason,
                backoff,
            )
