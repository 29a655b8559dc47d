"""Epochs, and the numbers of their frames: what shows that target and draft are out of step."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_ssd.wire.messages import MAX_EPOCH_JUMP, DraftBound, TargetBound, ToDraft


class OutOfStepError(Exception):
    """A frame cannot be the next one of this epoch; says why."""


class Epochs:
    """The epoch of the exchange with the draft, and the numbers of its frames both ways."""

    def __init__(self) -> None:
        self.epoch = 0
        """Changes when the draft has forgotten all requests."""
        self._sent = self._expected = 0

    @property
    def has_sent(self) -> bool:
        """Whether a frame of this epoch has been sent."""
        return self._sent > 0

    def restart(self) -> None:
        """A new channel: no frame of an earlier epoch can arrive there."""
        self.epoch = 0

    def begin(self) -> None:
        """A new epoch."""
        self.epoch += 1
        self._sent = self._expected = 0

    def number(self, frames: Sequence[list[ToDraft]]) -> list[DraftBound]:
        """Frames with this epoch and the numbers that come next, until they are :meth:`sent`."""
        return [
            DraftBound(self.epoch, number, messages)
            for number, messages in enumerate(frames, self._sent)
        ]

    def sent(self, frames: int) -> None:
        """So many frames were sent."""
        self._sent += frames

    def accept(self, frame: TargetBound) -> bool:
        """Whether a frame is the next one; False if it is to be ignored.

        Raises:
            OutOfStepError: this epoch must end.
        """
        if frame.epoch == self.epoch and frame.number == self._expected:
            self._expected += 1
            return True
        ahead = frame.epoch - self.epoch
        if 0 < ahead <= MAX_EPOCH_JUMP:
            # An error; but if the draft is in that epoch, it takes only frames of a later one.
            self.epoch = frame.epoch
        if ahead > 0:
            raise OutOfStepError(f"a frame of epoch {frame.epoch}")
        if ahead < 0 or frame.number < self._expected:
            return False
        raise OutOfStepError(f"frame {frame.number} in place of {self._expected}")
