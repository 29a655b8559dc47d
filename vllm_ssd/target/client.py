"""The client of the draft: epochs, the speculation cache, loss and restart.

Nothing here blocks decoding, except for the time :meth:`DraftClient.poll` is asked to wait. Every
failure ends in a new epoch (the requests are announced again) or a new link (a process is started
or a server connected to in the background, with back-off).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from vllm_ssd.core.stats import Stats
from vllm_ssd.target.links.link import Link
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.wire.channel import ChannelClosedError, ChannelFullError
from vllm_ssd.wire.messages import (
    MAX_EPOCH_JUMP,
    Alive,
    Allocate,
    DraftBound,
    Failed,
    Forked,
    Join,
    Lost,
    Planted,
    Progress,
    Pruned,
    Ready,
    Report,
    Setup,
    Start,
    Stepped,
    TargetBound,
    ToDraft,
    ToTarget,
)

logger = logging.getLogger("vllm.vllm_ssd")

SILENCE_SECONDS = 5.0
"""A draft that leaves a frame unanswered for so long is presumed hung and replaced."""
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 60.0
"""Before a process is started again, which takes cores and memory from the others."""
LONGEST_REJOIN_SECONDS = 1.0
"""Before the next attempt to reach a server, which costs a thread of ours next to nothing."""
LOG_AGAIN_SECONDS = 60.0
"""The same failure is logged once in this time."""
CLOSE_SECONDS = 10.0
"""How long closing waits for the draft to be gone; a killed process is gone in much less."""
EXIT_CODE_SECONDS = 1.0
WAITING_SECONDS = 10.0
"""While the engine's start waits for the draft, the log says so every so often."""
STABLE_SECONDS = 60.0
"""A draft that was up for this long starts the back-off anew."""


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
    ) -> None:
        self.up = False
        """Whether the draft has come up and takes requests."""
        sampled_from = 0 if join.draft_sampling == "greedy" else join.draft_top_n
        self.published = PublishedTrees(join.num_speculative_tokens, join.vocab_size, sampled_from)
        self.draft_counters: dict[str, float] = {}
        """Counters of this draft, added to those of the drafts before it."""
        self._counters_before: dict[str, float] = {}
        self.draft_gauges: dict[str, float] = {}
        """What the draft uses of what it has."""
        self.link: Link | None = None
        """The way to the draft; None if it is lost."""
        self._reach = reach
        self._join = join
        self._setup = setup
        self._agreed = agreed
        self._longest_backoff = LONGEST_BACKOFF_SECONDS
        if setup is None and not starts_server:
            self._longest_backoff = LONGEST_REJOIN_SECONDS
        self._memory: int | None = None
        """What a process of our own may take for its KV cache, once that is known."""
        self._opened = False
        """Whether the first messages were sent."""
        self._startup_timeout_s = startup_timeout_s
        self._stats = stats
        self._forget_requests = forget_requests
        self.epoch = 0
        """Changes when the draft has forgotten all requests."""
        self.received = 0
        """Frames of the draft so far."""
        self._number = self._expected = 0
        self._steps: list[Stepped] = []
        """Received and not applied yet."""
        self._failures = 0
        self._started_at = self._up_since = 0.0
        self._start_after = 0.0
        self._unanswered_since: float | None = None
        self._failure = ""
        self._logged = ("", 0.0)
        """The failure last logged, and when."""
        self._doing = ""
        """What it does to come up."""
        self._was_up = False
        self._closed = self._asleep = False

    # ---- life of the draft

    def launch(self) -> None:
        """Start the draft, which takes no memory before :meth:`allocate`, or connect to it."""
        self._started_at = time.monotonic()
        self._failure = ""
        self._doing = "starts"
        # A new draft has a new channel: no frame of an earlier epoch can arrive there.
        self.epoch = 0
        self._begin_epoch()
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
                raise RuntimeError(f"ssd: the draft process did not come up: {self._failure}")
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
            since = self._unanswered_since
            if since is not None and now - since > SILENCE_SECONDS:
                self._lose(f"no sign of life for {SILENCE_SECONDS:g} s")
        elif now - self._started_at > self._startup_timeout_s:
            self._lose(f"not up after {self._startup_timeout_s:g} s")

    def sleep(self) -> None:
        """End the draft process, so that its memory is free, until :meth:`wake_up`."""
        self._asleep = True
        self._counters_before = self.draft_counters
        self._end()
        self._begin_epoch()

    def wake_up(self) -> None:
        """Start the draft process again, and wait for nothing: decoding is plain until it is up."""
        if not self._asleep or self._closed:
            return
        self._asleep = False
        self._failures = 0
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
        self._failure = self._failure or reason
        now = time.monotonic()
        stable = was_up and now - self._up_since > STABLE_SECONDS
        self._failures = 1 if stable else self._failures + 1
        doubled = 2 ** min(self._failures - 1, 10)
        backoff = min(FIRST_BACKOFF_SECONDS * doubled, self._longest_backoff)
        self._start_after = now + backoff
        self._counters_before = self.draft_counters
        self._begin_epoch()
        # At its start the engine itself reports what became of its process.
        known, logged_at = self._logged
        again = now - logged_at > LOG_AGAIN_SECONDS or self._failure != known
        if (self._was_up or self._setup is None) and (was_up or again):
            self._logged = self._failure, now
            logger.warning(
                "ssd: %s %s: %s; decoding plainly, next start in %.1f s",
                link or "draft",
                "lost" if was_up else "not reached",
                self._failure,
                backoff,
            )

    # ---- frames

    def send(self, messages: list[ToDraft]) -> None:
        """Send without blocking; what cannot be sent ends the epoch.

        Small messages go first, in a frame of their own, so as not to wait for long texts.
        """
        if self.up and messages:
            frames: list[list[ToDraft]] = [[]]
            for message in messages:
                if isinstance(message, Start):
                    frames.append([message])
                else:
                    frames[0].append(message)
            self._put(*(frame for frame in frames if frame))

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
            frames = self.link.channel.receive(timeout)
        except ChannelClosedError as error:
            self._lose(str(error))
            return
        if frames:
            self._unanswered_since = None
            self.received += len(frames)
        try:
            for frame in frames:
                self._take(frame)
            self._apply_steps()
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            # The other frames that have arrived belong to the epoch that ends here.
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
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.epoch += 1
        self._number = self._expected = 0
        self._steps.clear()
        self._unanswered_since = None
        self.published.clear()
        self._forget_requests()

    def _put(self, *frames: list[ToDraft]) -> None:
        if self.link is None or self.link.channel is None:
            return
        numbered = [
            DraftBound(self.epoch, number, messages)
            for number, messages in enumerate(frames, self._number)
        ]
        try:
            self.link.channel.send(*numbered)
        except ChannelFullError as error:
            # The draft reads nothing: its silence counts, whatever epoch that is.
            self._unanswered_since = since = self._unanswered_since or time.monotonic()
            if self._number:
                self.resync(str(error))
                self._unanswered_since = since
            else:
                self._forget_requests()  # they were not announced after all
            return
        except ChannelClosedError as error:
            self._lose(str(error))
            return
        self._number += len(frames)
        for messages in frames:
            for message in messages:
                if isinstance(message, Start):
                    self.published.announce(message.handle)
        if self._unanswered_since is None:
            self._unanswered_since = time.monotonic()

    def _take(self, frame: TargetBound | None) -> None:
        if frame is None:
            self.resync("a frame that cannot be decoded")
            return
        ahead = frame.epoch - self.epoch
        if 0 < ahead <= MAX_EPOCH_JUMP:
            # An error; but if the draft is in that epoch, it takes only frames of a later one.
            self.epoch = frame.epoch
        if ahead > 0:
            self.resync(f"a frame of epoch {frame.epoch}")
            return
        if ahead < 0 or frame.number < self._expected:
            return
        if frame.number > self._expected:
            self.resync(f"frame {frame.number} in place of {self._expected}")
            return
        self._expected += 1
        for message in frame.messages:
            if frame.epoch != self.epoch:
                return
            if isinstance(message, Stepped):
                self._steps.append(message)
            else:
                self._apply_steps()
                self._apply(message)

    def _apply_steps(self) -> None:
        """Apply the decode steps that have come in a row, as one."""
        if self._steps:
            steps, self._steps = self._steps, []
            self.published.steps(steps)

    def _apply(self, message: ToTarget) -> None:
        match message:
            case Planted():
                self.published.plant(message)
            case Forked():
                self.published.fork(message)
            case Pruned():
                self.published.prune(message)
            case Report():
                before = self._counters_before
                self.draft_counters = {
                    name: count + before.get(name, 0.0) for name, count in message.counters.items()
                }
                self.draft_gauges = message.gauges
                steps = np.frombuffer(message.step_seconds, np.float32)
                self._stats.recent["draft_step_seconds"].extend(steps.tolist())
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
            case Alive():
                pass
