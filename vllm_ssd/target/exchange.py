"""The frames between the target and its draft.

Whatever goes wrong with them (one is missing, garbled or refused) is to end the epoch: all requests
are announced again in the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from vllm_ssd.core.stats import Stats
from vllm_ssd.target.arrivals import Arrivals
from vllm_ssd.target.counters import DraftCounters
from vllm_ssd.target.epochs import Epochs, OutOfStepError
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.wire.channel import Channel, ChannelFullError
from vllm_ssd.wire.messages import Start, TargetBound, ToDraft, ToTarget


class Exchange:
    """Sends and receives, and keeps the target's copy of the speculation trees.

    Args:
        published: that copy, of a draft that has not come up yet.
        stats: counters to keep.
        forget_requests: called when all requests must be announced again.
    """

    def __init__(
        self,
        published: PublishedTrees,
        stats: Stats,
        forget_requests: Callable[[], None],
    ) -> None:
        self.published = published
        self.reported = DraftCounters()
        self.received = 0
        """Frames of the draft so far."""
        self.unanswered_since: float | None = None
        """When the first frame was sent that nothing has come after."""
        self._epochs = Epochs()
        self._arrivals = Arrivals(published, self.reported, stats)
        self._forget_requests = forget_requests

    @property
    def epoch(self) -> int:
        """Changes when the draft has forgotten all requests."""
        return self._epochs.epoch

    def begin_epoch(self, new_channel: bool = False) -> None:
        """Forget all requests.

        Args:
            new_channel: no frame of an earlier epoch can arrive there.
        """
        if new_channel:
            self._epochs.restart()
        self._epochs.begin()
        self._arrivals.clear()
        self.unanswered_since = None
        self.published.clear()
        self._forget_requests()

    def send(self, channel: Channel[TargetBound], messages: list[ToDraft]) -> None:
        """Send without blocking.

        Small messages go first, in a frame of their own, so as not to wait for long texts.

        Raises:
            OutOfStepError: the draft misses these frames, and had others of this epoch.
            ChannelClosedError: the draft is gone.
        """
        texts = [each for each in messages if isinstance(each, Start)]
        small: list[ToDraft] = [each for each in messages if not isinstance(each, Start)]
        frames: list[list[ToDraft]] = [small] if small else []
        frames += [[text] for text in texts]
        try:
            channel.send(*self._epochs.number(frames))
        except ChannelFullError as error:
            self.unanswered_since = self.unanswered_since or time.monotonic()
            if self._epochs.has_sent:
                raise OutOfStepError(str(error)) from error
            self._forget_requests()  # they were not announced after all
            return
        self._epochs.sent(len(frames))
        for text in texts:
            self.published.announce(text.handle)
        if self.unanswered_since is None:
            self.unanswered_since = time.monotonic()

    def receive(self, channel: Channel[TargetBound], timeout: float) -> Iterator[ToTarget]:
        """Apply what has arrived; what the draft says of itself is the caller's to take.

        Args:
            channel: to the draft.
            timeout: seconds to wait for something to arrive.

        Yields:
            Such messages, in their turn.

        Raises:
            OutOfStepError: a frame is missing or garbled.
            ValueError: a message does not make sense.
            IndexError: the same.
            ChannelClosedError: the draft is gone.
        """
        frames = channel.receive(timeout)
        if frames:
            self.unanswered_since = None
            self.received += len(frames)
        epochs, take = self._epochs, self._arrivals.take
        for frame in frames:
            if frame is None:
                raise OutOfStepError("a frame that cannot be decoded")
            if not epochs.accept(frame):
                continue
            for message in frame.messages:
                if take(message):
                    continue
                yield message
                if frame.epoch != epochs.epoch:
                    break  # that message has ended the epoch
        self._arrivals.flush()
