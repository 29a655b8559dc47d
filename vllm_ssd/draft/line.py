"""The draft's end of a target's line: its epochs and frames, and the session they are for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from vllm_ssd.draft.engine import DraftEngine
from vllm_ssd.draft.session import OutOfStepError, Session
from vllm_ssd.draft.validation import Bounds, check
from vllm_ssd.wire.channel import Channel
from vllm_ssd.wire.messages import (
    MAX_EPOCH_JUMP,
    Alive,
    DraftBound,
    Lost,
    Report,
    ServerBound,
    TargetBound,
    ToDraft,
    ToTarget,
)

logger = logging.getLogger("vllm.vllm_ssd.draft")

ALIVE_SECONDS = 0.5
"""During a step longer than this, signs of life are sent."""
REPORT_SECONDS = 0.25
_LOST_SECONDS = 0.05


class Line:
    """One target's line.

    Args:
        channel: frames from and to the target.
        before: takes the messages that come before a session.
    """

    def __init__(
        self,
        channel: Channel[DraftBound] | Channel[ServerBound],
        before: Callable[[Line, ToDraft], None],
    ) -> None:
        self.channel = channel
        self._before = before
        self._session: Session | None = None
        self._engine: DraftEngine | None = None
        self._bounds: Bounds | None = None
        self._lock = threading.Lock()
        self._epoch = -1
        self._expected = 0
        self._broken = False
        self._number = 0
        self._last_sent = time.monotonic()
        self._last_lost = 0.0
        self._last_report = 0.0
        self._steps_reported = 0
        self._owes_answer = False
        """Whether the target has sent something and nothing was sent to it since."""
        self._closed = False
        self._reads = False
        """Whether the target has sent something since the last report: one that is idle does not
        read, and steps go on for the others."""

    @property
    def joined(self) -> bool:
        """Whether it is a target's that has joined."""
        return self._session is not None

    def serve(self, engine: DraftEngine, session: Session, bounds: Bounds) -> None:
        """The target has joined: what it sends from now on is for this session."""
        self._engine, self._session, self._bounds = engine, session, bounds
        self._steps_reported = engine.steps

    def close(self) -> None:
        """The target is gone: free what it held."""
        with self._lock:  # signs of life are sent by another thread
            self._closed = True
            self.channel.close()
        if self._engine is not None and self._session is not None:
            self._engine.close(self._session)
        self._engine = self._session = None

    # ---- frames

    def receive(self) -> bool:
        """Take in the frames that have arrived.

        Returns:
            Whether there were any.

        Raises:
            ConnectionError: the target is gone.
        """
        frames = self.channel.receive(0.0)
        self._owes_answer |= bool(frames)
        if frames and self._session is not None:
            self._session.share.last_heard = time.monotonic()
            self._reads = True
        for frame in frames:
            self._take(frame)
        return bool(frames)

    def _take(self, frame: DraftBound | ServerBound | None) -> None:
        """Apply a frame if it is the one expected; ask for a new epoch if one is missing."""
        if frame is None:
            self.lost("a frame that cannot be decoded")
            return
        if frame.epoch > self._epoch + MAX_EPOCH_JUMP:
            self.lost(f"a frame of epoch {frame.epoch}")
            return
        if frame.epoch > self._epoch:
            if self._session is not None:
                self._session.reset()
            with self._lock:
                self._epoch, self._expected, self._number = frame.epoch, 0, 0
            self._broken = False
        late = frame.epoch < self._epoch or frame.number < self._expected
        if late and not self._broken:
            return
        if self._broken or frame.number != self._expected:
            self.lost(f"frame {frame.number} in place of {self._expected}")
            return
        self._expected += 1
        try:
            for message in frame.messages:
                self._handle(message)
        except (OutOfStepError, ValueError, IndexError, OverflowError) as error:
            self.lost(str(error))

    def _handle(self, message: ToDraft) -> None:
        if self._session is None or self._bounds is None:
            self._before(self, message)
            return
        check(message, self._bounds)
        self._session.handle(message)

    def lost(self, reason: str) -> None:
        """Ask for a new epoch; the rest of this one is ignored."""
        if self._session is not None and not self._broken:
            self._session.reset()
        self._broken = True
        now = time.monotonic()
        if now - self._last_lost > _LOST_SECONDS:
            self._last_lost = now
            logger.warning("ssd draft: out of step with the target (%s)", reason)
            self.send([Lost()])

    # ---- to the target

    def send(self, messages: Sequence[ToTarget]) -> None:
        """Send a frame.

        Raises:
            ConnectionError: the target is gone, or reads nothing.
        """
        with self._lock:
            frame = TargetBound(self._epoch, self._number, list(messages))
            self._number += 1
            self._last_sent = time.monotonic()
            self._owes_answer = False
            self.channel.send(frame)

    def publish(self, answers: bool = False) -> None:
        """Send what has changed in the target's trees.

        Args:
            answers: also if that is nothing: a target presumes a draft hung that does not answer.
        """
        messages = self._session.publications() if self._session is not None else []
        if messages or answers:
            self.send(messages)

    @property
    def unreported(self) -> bool:
        """Whether there were steps since the last report, of which the target wants to know."""
        return (
            self._reads and self._engine is not None and self._engine.steps != self._steps_reported
        )

    def report(self, now: float) -> None:
        """Send the counters, if there were steps since the last time and it is not too early."""
        engine, session = self._engine, self._session
        if engine is None or session is None or not self.unreported:
            return
        if now - self._last_report > REPORT_SECONDS:
            seconds = engine.step_seconds_since(self._steps_reported)
            self._last_report, self._steps_reported = now, engine.steps
            self._reads = False
            self.send([Report(session.counters, seconds.tobytes(), engine.gauges())])

    def beat(self, busy: bool) -> None:
        """A sign of life, if the target has waited for an answer for a while.

        One that is idle does not read: what is sent to it would pile up.

        Args:
            busy: whether the draft is in a turn of its loop: what the target has sent is not read.
        """
        if time.monotonic() - self._last_sent <= ALIVE_SECONDS:
            return
        with self._lock:
            unread = busy and (self._owes_answer or self.channel.has_input())
            # A long text may take its time on a slow network.
            waits = not self._closed and (unread or self.channel.has_partial)
        if waits:
            self.send([Alive()])
