"""The client of the draft: start, loss and restart.

Nothing here blocks decoding, except for the time :meth:`DraftClient.poll` is asked to wait. Every
failure ends in a new epoch (the requests are announced again) or a new link (a process is started
or a server connected to in the background, with back-off).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from vllm_ssd.core.stats import Stats
from vllm_ssd.target.epochs import OutOfStepError
from vllm_ssd.target.exchange import Exchange
from vllm_ssd.target.failures import (
    LONGEST_BACKOFF_SECONDS,
    LONGEST_REJOIN_SECONDS,
    Failures,
)
from vllm_ssd.target.links.link import Link
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.wire.channel import ChannelClosedError
from vllm_ssd.wire.messages import (
    Allocate,
    Failed,
    Join,
    Lost,
    Progress,
    Ready,
    Setup,
    ToDraft,
    ToTarget,
)

logger = logging.getLogger("vllm.vllm_ssd")

SILENCE_SECONDS = 5.0
"""A draft that leaves a frame unanswered for so long is presumed hung and replaced."""
CLOSE_SECONDS = 10.0
"""How long closing waits for the draft to be gone; a killed process is gone in much less."""
EXIT_CODE_SECONDS = 1.0
WAITING_SECONDS = 10.0
"""While the engine's start waits for the draft, the log says so every so often."""


class DraftClient:
    """Owns the link to the draft and the target's copy of the speculation trees.

    Args:
        reach: starts the draft, or begins to connect to it; called again after each loss.
        join: what the target wants of it.
        startup_timeout_s: how long a start may take.
        stats: counters to keep.
        forget_requests: called when all requests must be announced again.
        setup: how a process of the target's own brings its model up; None for a draft that is up.
        agreed: called with the limits of the draft that has come up.
        starts_server: whether reaching a draft that is up may mean to start it first.
        published: takes the trees that the draft publishes; by default a copy of them on the host.
    """

    def __init__(
        self,
        reach: Callable[[], Link],
        join: Join,
        startup_timeout_s: float,
        stats: Stats,
        forget_requests: Callable[[], None],
        setup: Setup | None = None,
        agreed: Callable[[Ready], None] = lambda ready: None,
        starts_server: bool = False,
        published: PublishedTrees | None = None,
    ) -> None:
        self.up = False
        """Whether the draft has come up and takes requests."""
        self.published = _trees_for(join) if published is None else published
        self._exchange = Exchange(self.published, stats, forget_requests)
        self.reported = self._exchange.reported
        """What the draft counts."""
        self.link: Link | None = None
        """The way to the draft; None if it is lost."""
        self._reach = reach
        self._join = join
        self._setup = setup
        self._agreed = agreed
        only_connects = setup is None and not starts_server
        self._failures = Failures(
            LONGEST_REJOIN_SECONDS if only_connects else LONGEST_BACKOFF_SECONDS
        )
        self._memory: int | None = None
        """What a process of our own may take for its KV cache, once that is known."""
        self._opened = False
        """Whether the first messages were sent."""
        self._startup_timeout_s = startup_timeout_s
        self._stats = stats
        self._started_at = self._up_since = 0.0
        self._start_after = 0.0
        self._doing = ""
        """What it does to come up."""
        self._was_up = False
        self._closed = self._asleep = False

    @property
    def epoch(self) -> int:
        """Changes when the draft has forgotten all requests."""
        return self._exchange.epoch

    @property
    def received(self) -> int:
        """Frames of the draft so far."""
        return self._exchange.received

    # ---- life of the draft

    def launch(self) -> None:
        """Start the draft, which takes no memory before :meth:`allocate`, or connect to it."""
        self._started_at = time.monotonic()
        self._failures.reason = ""
        self._doing = "starts"
        self._exchange.begin_epoch(new_channel=True)
        self._opened = False
        try:
            self.link = self._reach()
        except OSError as error:
            self._lose(f"cannot be started: {error}")
            return
        self._open()

    def _open(self) -> None:
        """Send the first messages, as soon as there is a channel."""
        if self.link is None or self._opened:
            return
        if self.link.failure is not None:
            self._lose(self.link.failure)
        elif self.link.channel is not None:
            self._opened = True
            if self._setup is None:
                # Nothing has looked while the target came up: that does not count.
                self._started_at = time.monotonic()
                self._put([self._join])
                return
            self._put([self._setup])
            if self._memory is not None:
                self._put([Allocate(self._memory), self._join])

    def allocate(self, kv_cache_memory_bytes: int) -> None:
        """Let a process of our own load the model and allocate a KV cache of this size."""
        # Until now it may have waited for the target: that does not count as its start-up.
        self._started_at = time.monotonic()
        self._memory = kv_cache_memory_bytes
        if self._opened and self._setup is not None:
            self._put([Allocate(kv_cache_memory_bytes), self._join])

    def wait_until_up(self) -> None:
        """Wait for the first start to succeed.

        Raises:
            RuntimeError: the draft failed, ended, or took longer than the timeout.
        """
        deadline = self._started_at + self._startup_timeout_s
        logged = time.monotonic()
        while not self.up:
            if self.link is None:
                self._closed = True
                raise RuntimeError(
                    f"ssd: the draft process did not come up: {self._failures.reason}"
                )
            remaining = deadline - time.monotonic()
            # Look even with no time left: it may have come up long ago.
            self.poll(min(max(0.0, remaining), WAITING_SECONDS))
            if time.monotonic() > logged + WAITING_SECONDS and not self.up:
                logged = time.monotonic()
                seconds = logged - self._started_at
                logger.info("ssd: waiting for the draft: it %s, %.0f s", self._doing, seconds)
            if remaining <= 0.0 and not self.up and self.link is not None:
                self.close()
                raise RuntimeError(
                    f"ssd: the draft process took longer than draft_startup_timeout_s = "
                    f"{self._startup_timeout_s:g}; raise it or choose a smaller draft model"
                )

    def wait_for_answer(self, seconds: float) -> None:
        """Wait until a draft server has answered, or is found not to be there.

        Args:
            seconds: no longer than that.
        """
        deadline = time.monotonic() + seconds
        while not self.up and self.link is not None:
            left = deadline - time.monotonic()
            if left <= 0.0:
                return
            self.poll(left)

    def maintain(self) -> None:
        """Replace a draft that hangs; start the next one after its back-off. Never blocks."""
        if self._closed or self._asleep:
            return
        if not self.up:
            self.poll()  # the answer may be there already
        now = time.monotonic()
        if self.link is None:
            if now >= self._start_after:
                self._stats.restarts += 1
                self.launch()
        elif self.up:
            since = self._exchange.unanswered_since
            if since is not None and now - since > SILENCE_SECONDS:
                self._lose(f"no sign of life for {SILENCE_SECONDS:g} s")
        elif now - self._started_at > self._startup_timeout_s:
            self._lose(f"not up after {self._startup_timeout_s:g} s")

    def sleep(self) -> None:
        """End the draft process, so that its memory is free, until :meth:`wake_up`."""
        self._asleep = True
        self.reported.ended()
        self._end()
        self._exchange.begin_epoch()

    def wake_up(self) -> None:
        """Start the draft process again, and wait for nothing: decoding is plain until it is up."""
        if not self._asleep or self._closed:
            return
        self._asleep = False
        self._failures.forget()
        self.launch()

    def close(self) -> None:
        """End the draft process for good."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        self.up = False
        if self.link is not None:
            self.link.end()
            # Its memory must be free before anything else starts.
            self.link.wait(CLOSE_SECONDS)
            self.link = None

    def _lose(self, reason: str) -> None:
        """End a link that is lost, and plan the next start."""
        link, self.link = self.link, None
        was_up, self.up = self.up, False
        if link is not None:
            if not self._was_up and self._setup is not None:
                link.wait(EXIT_CODE_SECONDS)  # at the engine's start there is time to wait
            code = link.exit_code
            link.end()
            if code is not None:
                reason = f"{reason} (exit code {code})"
        now = time.monotonic()
        backoff = self._failures.count(reason, up_for=now - self._up_since if was_up else 0.0)
        self._start_after = now + backoff
        self.reported.ended()
        self._exchange.begin_epoch()
        # At its start the engine itself reports what became of its process.
        if self._was_up or self._setup is None:
            self._failures.log(str(link or "draft"), was_up, backoff, now)

    # ---- frames

    def send(self, messages: list[ToDraft]) -> None:
        """Send without blocking; what cannot be sent ends the epoch."""
        if self.up and messages:
            self._put(messages)

    def poll(self, timeout: float = 0.0) -> None:
        """Apply what has arrived.

        Args:
            timeout: seconds to wait for something to arrive.
        """
        self._open()
        if self.link is None:
            return
        if self.link.channel is None:
            if timeout:
                self.link.wait(timeout)
            return
        try:
            for message in self._exchange.receive(self.link.channel, timeout):
                self._hear(message)
        except ChannelClosedError as error:
            self._lose(str(error))
        except OutOfStepError as error:
            self.resync(str(error))
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            self.resync(f"a message that does not make sense: {error!r}")

    def resync(self, reason: str, logged: bool = False) -> None:
        """Give up this epoch: forget all trees and announce the live requests again.

        Args:
            reason: for the log.
            logged: it has been logged already.
        """
        if not self.up:
            # The messages that bring a draft up are sent only once, at its start.
            self._lose(reason)
            return
        if not logged:
            logger.warning(
                "ssd: out of step with the draft (%s); announcing all requests anew", reason
            )
        self._stats.resyncs += 1
        self._exchange.begin_epoch()

    def _put(self, messages: list[ToDraft]) -> None:
        if self.link is None or self.link.channel is None:
            return
        try:
            self._exchange.send(self.link.channel, messages)
        except ChannelClosedError as error:
            self._lose(str(error))
        except OutOfStepError as error:
            # The draft reads nothing: its silence counts, whatever epoch that is.
            since = self._exchange.unanswered_since
            self.resync(str(error))
            self._exchange.unanswered_since = since

    def _hear(self, message: ToTarget) -> None:
        """What the draft says of itself."""
        match message:
            case Lost():
                self.resync("the draft missed a frame")
            case Ready():
                self.published.start(message)
                self._agreed(message)
                self.up = self._was_up = True
                self._up_since = time.monotonic()
                logger.info(
                    "ssd: %s is up%s: %d rows, %d KV blocks of %d tokens",
                    self.link,
                    f" ({message.model})" if message.model else "",
                    message.max_rows,
                    message.num_blocks,
                    message.block_size,
                )
            case Progress():
                if not self.up and message.what != self._doing:
                    self._doing = message.what[:80]
                    logger.info("ssd: %s %s", self.link, self._doing)
            case Failed():
                self._lose(message.reason)


def _trees_for(join: Join) -> PublishedTrees:
    sampled_from = 0 if join.draft_sampling == "greedy" else join.draft_top_n
    return PublishedTrees(join.num_speculative_tokens, join.vocab_size, sampled_from)
