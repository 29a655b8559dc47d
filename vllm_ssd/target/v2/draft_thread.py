"""The thread that has the draft: it alone calls the client, whatever comes from where.

It sleeps until the draft has sent something or the target has something to tell. The target's main
thread posts calls and goes on.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

from vllm_ssd.core.stats import Stats
from vllm_ssd.target.client import DraftClient

logger = logging.getLogger("vllm.vllm_ssd")

Result = TypeVar("Result")

LOOK_SECONDS = 0.25
"""A draft that is up is looked after so often at least."""
LOOK_FOR_SECONDS = 0.02
"""The same for one that is on its way up, or lost; also the pause after an error, so that one that
comes again at once takes no core."""
CALLS_SECONDS = 0.005
"""No longer than that calls go before what the draft has sent."""
DEAD_AFTER_SECONDS = 1.0
"""Who waits for an answer looks so often whether the thread lives."""


class DraftThread:
    """Runs what concerns the draft, in order.

    It holds nothing of the worker's, so that an engine that is dropped is freed.

    Args:
        client: the draft's.
        stats: counts errors.
        strict: keep the first error, for :meth:`check`.
        after_each: called at the end of each turn, every 0.25 s at least.
    """

    def __init__(
        self,
        client: DraftClient,
        stats: Stats,
        strict: bool,
        after_each: Callable[[], object] = lambda: None,
    ) -> None:
        self._client = client
        self._stats = stats
        self._strict = strict
        self._after_each = after_each
        self._calls: deque[Callable[[], object]] = deque()
        self._wake_end, self._woken_end = os.pipe()[::-1]
        os.set_blocking(self._wake_end, False)
        # Not with the thread: others may be about to write to it, and numbers are used again.
        weakref.finalize(self, _close, self._wake_end, self._woken_end)
        self._ending = False
        self._error: Exception | None = None
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="vllm-ssd-draft", daemon=True)
        self._thread.start()

    def post(self, call: Callable[[], object]) -> None:
        """Have something done soon. Never waits; after :meth:`close` nothing is done."""
        if not self._ending:
            self._calls.append(call)
            self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake_end, b"\0")

    def ask(self, call: Callable[[], Result]) -> Result:
        """Have something done now, after all that was posted, and wait for its result.

        Raises:
            RuntimeError: the thread has ended.
            Exception: what the call raises.
        """
        if self._ending:
            raise RuntimeError("ssd: the draft's thread has ended")
        future: Future[Result] = Future()

        def answer() -> None:
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

        self.post(answer)
        while not wait([future], DEAD_AFTER_SECONDS).done:
            if not self._thread.is_alive() and not future.done():
                raise RuntimeError("ssd: the draft's thread has ended")
        return future.result()

    def report(self, error: Exception) -> None:
        """Take an error of the plugin in another thread as one of this thread's. Never waits."""
        self._keep(error)
        self.post(lambda: self._degrade(error))

    def check(self) -> None:
        """Raise the first error of the thread, if errors are to be raised (option ``strict``)."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the draft, then the thread."""
        if not self._ending:
            self._ending = True
            self._wake()
        if threading.current_thread() is not self._thread:  # a finalizer runs anywhere
            self._thread.join()

    def _run(self) -> None:
        try:
            while not (self._ending and not self._calls):
                self._take_turn()
        finally:
            self._ending = True
            self._client.close()

    def _take_turn(self) -> None:
        """Do what there is to do, then sleep until there is more."""
        try:
            until = time.monotonic() + CALLS_SECONDS
            while self._calls and time.monotonic() < until:
                self._calls.popleft()()
            self._client.poll()
            self._client.maintain()
            self._after_each()
            if not self._ending and not self._calls:
                self._sleep()
        except Exception as error:  # no error of the plugin may stop the engine
            self._degrade(error)
            time.sleep(LOOK_FOR_SECONDS)

    def _sleep(self) -> None:
        """Wait for a call, or for something from the draft."""
        poll = select.poll()
        poll.register(self._woken_end, select.POLLIN)
        link = self._client.link
        if link is not None and link.channel is not None:
            poll.register(link.channel.fileno(), select.POLLIN)
        seconds = LOOK_SECONDS if self._client.up else LOOK_FOR_SECONDS
        ready = poll.poll(seconds * 1000.0)
        if any(descriptor == self._woken_end for descriptor, _ in ready):
            os.read(self._woken_end, 1 << 16)

    def _degrade(self, error: Exception) -> None:
        """Go on after an error of ours, in a new epoch."""
        self._count(error)
        if self._client.up:
            try:
                self._client.resync("an error in the plugin", logged=True)
            except Exception as another:
                self._count(another)

    def _count(self, error: Exception) -> None:
        """Count an error; one log line, not one a step."""
        self._stats.errors += 1
        self._keep(error)
        if not self._complained:
            self._complained = True
            logger.error("ssd: error in the plugin; decoding goes on without it", exc_info=error)

    def _keep(self, error: Exception) -> None:
        if self._strict and self._error is None:
            self._error = error


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
