"""The line to the draft process: epochs, the speculation cache, loss and restart.

Nothing here blocks the target beyond the wait it is told to make; whatever goes wrong ends in a new
epoch (the requests are announced again) or a new process (in the background, with back-off).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from vllm_ssd.core.stats import Stats
from vllm_ssd.core.tree import Int32Array, SpeculationCache
from vllm_ssd.target.process import DraftProcess
from vllm_ssd.wire.channel import ChannelClosedError, ChannelFullError
from vllm_ssd.wire.messages import (
    Alive,
    Allocate,
    DraftBound,
    Failed,
    Forked,
    Lost,
    Planted,
    Ready,
    Report,
    Setup,
    Stepped,
    TargetBound,
    ToDraft,
    ToTarget,
    unpack,
)

logger = logging.getLogger("vllm.vllm_ssd")

SILENCE_SECONDS = 5.0
"""A draft that leaves a frame unanswered for so long is taken for stopped, and replaced."""
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 60.0
STABLE_SECONDS = 60.0
"""After this long without loss the next restart is immediate again."""


class DraftClient:
    """Owns the draft process and the target's copy of the speculation trees.

    Args:
        setup: how the draft brings its model up.
        cores: CPU cores of the draft process.
        startup_timeout_s: how long a start may take.
        stats: counters to keep.
        forget_requests: called when all requests must be announced anew.
    """

    def __init__(
        self,
        setup: Setup,
        cores: list[int],
        startup_timeout_s: float,
        stats: Stats,
        forget_requests: Callable[[], None],
    ) -> None:
        self.up = False
        """Whether the draft can be talked to."""
        self.cache = SpeculationCache(1, 1)
        self.withdrawn: set[int] = set()
        """Handles the draft holds nothing for at the moment."""
        self.draft_counters: dict[str, float] = {}
        self.process: DraftProcess | None = None
        self._setup = setup
        self._allocate = Allocate(0)
        self._width = 2 * setup.num_speculative_tokens + 2
        self._cores = cores
        self._startup_timeout_s = startup_timeout_s
        self._stats = stats
        self._forget_requests = forget_requests
        self._epoch = self._number = self._expected = 0
        self._failures = 0
        self._started_at = 0.0
        self._start_after = 0.0
        self._unanswered_since: float | None = None
        self._failure = ""
        self._closed = False

    # ---- life of the process

    def launch(self) -> None:
        """Start the process; it loads its libraries but takes no memory yet."""
        self.process = DraftProcess(self._cores)
        self._started_at = time.monotonic()
        self._failure = ""
        self._begin_epoch()
        self._put([self._setup])

    def allocate(self, kv_cache_memory_bytes: int) -> None:
        """Let the process load the model and allocate a KV cache of this size."""
        self._allocate = Allocate(kv_cache_memory_bytes)
        self._put([self._allocate])

    def wait_until_up(self) -> None:
        """Wait for the first start to succeed.

        Raises:
            RuntimeError: the draft failed, ended, or took longer than the timeout.
        """
        deadline = self._started_at + self._startup_timeout_s
        while not self.up:
            if self.process is None:
                self._closed = True
                raise RuntimeError(f"ssd: the draft process did not come up: {self._failure}")
            remaining = deadline - time.monotonic()
            if remaining <= 0.0:
                self.close()
                raise RuntimeError(
                    f"ssd: the draft process took longer than draft_startup_timeout_s = "
                    f"{self._startup_timeout_s:g}; raise it or choose a smaller draft model"
                )
            self.poll(remaining)

    def maintain(self) -> None:
        """Replace a draft that fell silent, start one whose turn has come. Never blocks."""
        if self._closed:
            return
        now = time.monotonic()
        if self.process is None:
            if now >= self._start_after:
                self._stats.restarts += 1
                self.launch()
                self._put([self._allocate])
        elif self.up:
            since = self._unanswered_since
            if since is not None and now - since > SILENCE_SECONDS:
                self._lose(f"no sign of life for {SILENCE_SECONDS:g} s")
        elif now - self._started_at > self._startup_timeout_s:
            self._lose(f"not up after {self._startup_timeout_s:g} s")

    def close(self) -> None:
        """End the draft process for good."""
        self._closed = True
        self.up = False
        if self.process is not None:
            self.process.end()
            self.process = None

    def _lose(self, reason: str) -> None:
        """The process is of no use any more: end it and plan the next start."""
        process, self.process = self.process, None
        was_up, self.up = self.up, False
        if process is not None:
            code = process.exit_code
            process.end()
            if code is not None:
                reason = f"{reason} (exit code {code})"
        self._failure = self._failure or reason
        now = time.monotonic()
        stable = was_up and now - self._started_at > STABLE_SECONDS
        self._failures = 1 if stable else self._failures + 1
        backoff = min(FIRST_BACKOFF_SECONDS * 2 ** (self._failures - 1), LONGEST_BACKOFF_SECONDS)
        self._start_after = now + backoff
        self._begin_epoch()
        logger.warning(
            "ssd: draft process lost: %s; decoding plainly, next start in %.1f s",
            self._failure,
            backoff,
        )

    def drop(self, handle: int) -> None:
        """Forget a request's tree."""
        self.cache.trees.pop(handle, None)
        self.withdrawn.discard(handle)

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
        if self.process is None:
            return
        try:
            frames = self.process.channel.receive(timeout)
        except ChannelClosedError as error:
            self._lose(str(error))
            return
        if frames:
            self._unanswered_since = None
        for frame in frames:
            self._take(frame)

    def resync(self, reason: str) -> None:
        """Give up this epoch: forget all trees and announce the live requests anew."""
        logger.warning("ssd: out of step with the draft (%s); announcing all requests anew", reason)
        self._stats.resyncs += 1
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._epoch += 1
        self._number = self._expected = 0
        self._unanswered_since = None
        self.cache.clear()
        self.withdrawn.clear()
        self._forget_requests()

    def _put(self, messages: list[ToDraft]) -> None:
        if self.process is None:
            return
        try:
            self.process.channel.send(DraftBound(self._epoch, self._number, messages))
        except ChannelFullError as error:
            # Nothing sent in this epoch: there is nothing to be out of step with.
            if self._number:
                self.resync(str(error))
            return
        except ChannelClosedError as error:
            self._lose(str(error))
            return
        self._number += 1
        if self._unanswered_since is None:
            self._unanswered_since = time.monotonic()

    def _take(self, frame: TargetBound | None) -> None:
        if frame is None:
            self.resync("a frame that cannot be decoded")
            return
        if frame.epoch != self._epoch:
            return
        if frame.number < self._expected:
            return
        if frame.number > self._expected:
            self.resync(f"frame {frame.number} in place of {self._expected}")
            return
        self._expected += 1
        try:
            for message in frame.messages:
                self._apply(message)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            self.resync(f"a message that does not make sense: {error!r}")

    # ---- messages

    def _apply(self, message: ToTarget) -> None:
        match message:
            case Stepped():
                self._step(message)
            case Planted():
                self._plant(message)
            case Forked():
                self._fork(message)
            case Report():
                self.draft_counters = message.counters
            case Lost():
                self.resync("the draft missed a frame")
            case Ready():
                self.cache = SpeculationCache(message.max_rows, self._width)
                self.up = True
                logger.info(
                    "ssd: draft process %s is up: %d rows, %d KV blocks of %d tokens",
                    self.process and self.process.pid,
                    message.max_rows,
                    message.num_blocks,
                    message.block_size,
                )
            case Failed():
                self._failure = message.reason
                self._lose(message.reason)
            case Alive():
                pass

    def _step(self, message: Stepped) -> None:
        rows, tokens, ended = (
            unpack(message.rows),
            unpack(message.tokens),
            unpack(message.ended),
        )
        self._check_rows(rows)
        self._check_rows(ended)
        self._check_tokens(tokens)
        if len(rows) != len(tokens) or (self.cache.length[rows] >= self._width).any():
            raise ValueError("a step that does not fit its rows")
        self.cache.append(rows, tokens)
        self.cache.ended[ended] = True

    def _plant(self, message: Planted) -> None:
        handles, bases = unpack(message.handles).tolist(), unpack(message.bases).tolist()
        trunks, counts = unpack(message.trunks), unpack(message.counts).tolist()
        ended, tokens = unpack(message.ended).tolist(), unpack(message.tokens)
        self._check_rows(trunks[trunks >= 0])
        self._check_tokens(tokens)
        at = 0
        for handle, base, trunk, count, end in zip(
            handles, bases, trunks.tolist(), counts, ended, strict=True
        ):
            if not 0 <= count <= min(self._width, len(tokens) - at):
                raise ValueError(f"{count} tokens for a trunk")
            if trunk < 0:
                self.cache.trees.pop(handle, None)
                self.withdrawn.add(handle)
            else:
                self.withdrawn.discard(handle)
                self.cache.plant(handle, base, trunk, tokens[at : at + count], bool(end))
            at += count

    def _fork(self, message: Forked) -> None:
        counts, complete = unpack(message.counts).tolist(), unpack(message.complete).tolist()
        k, tokens, rows = unpack(message.k), unpack(message.tokens), unpack(message.rows)
        self._check_rows(rows)
        self._check_tokens(tokens)
        if not len(k) == len(tokens) == len(rows) == sum(counts):
            raise ValueError("forks of different lengths")
        at = 0
        for handle, count, done in zip(
            unpack(message.handles).tolist(), counts, complete, strict=True
        ):
            tree = self.cache.trees.get(handle)
            end = at + count
            if tree is not None:
                if count:
                    self.cache.add_forks(handle, k[at:end], tokens[at:end], rows[at:end])
                tree.complete = bool(done)
            at = end

    def _check_rows(self, rows: Int32Array) -> None:
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self.cache.length)):
            raise ValueError("a row that does not exist")

    def _check_tokens(self, tokens: Int32Array) -> None:
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self._setup.vocab_size):
            raise ValueError("a token outside the vocabulary")
