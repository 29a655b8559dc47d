"""The draft's loop: read what the targets send, re-plan, decode one step, publish."""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm_ssd.draft.agreement import Offer, agree
from vllm_ssd.draft.bring_up import BringUp
from vllm_ssd.draft.engine import DraftEngine
from vllm_ssd.draft.line import ALIVE_SECONDS, REPORT_SECONDS, Line
from vllm_ssd.draft.session import OutOfStepError, StepError
from vllm_ssd.draft.validation import Bounds
from vllm_ssd.wire.channel import Channel, peer_channel
from vllm_ssd.wire.messages import (
    Allocate,
    DraftBound,
    Failed,
    Join,
    Progress,
    Ready,
    ServerBound,
    Setup,
    ToDraft,
)

if TYPE_CHECKING:
    from vllm_ssd.wire.listener import Listener

logger = logging.getLogger("vllm.vllm_ssd.draft")

LOG_AGAIN_SECONDS = 60.0
"""The same refusal is logged once in this time."""


_MOST_FAILED = 3
"""So many steps in a row may fail before the server gives up."""
_MORE_WAITING = 8
"""So many connections more than there may be targets may wait to join; the oldest goes then."""


class DraftServer:
    """Drafts for the targets that it has, until :meth:`stop`.

    Args:
        most_targets: more are refused.
    """

    def __init__(self, most_targets: int = 1) -> None:
        self._most_targets = most_targets
        self._lines: list[Line] = []
        self._listener: Listener | None = None
        self._rising: BringUp | None = None
        self._engine: DraftEngine | None = None
        self._offer: Offer | None = None
        self._busy = False
        self._refusal = ("", 0.0)
        """The last one that was logged, and when."""
        self._failed = 0
        """Steps, one after the other."""
        self._joined = self._refused = 0
        """Targets."""
        self._stopped = threading.Event()

    # ---- the model

    def bring_up(self, setup: Setup, tell: Callable[[str], None], vocabulary: str = "") -> None:
        """Begin to bring the model up. Arguments and errors are those of :class:`BringUp`."""
        self._rising = BringUp(setup, tell, vocabulary)

    def allocate(self, kv_cache_memory_bytes: int) -> Offer:
        """Bring it up to the end. Raises as :meth:`BringUp.allocate`."""
        if self._rising is None:
            raise OutOfStepError("no model yet")
        engine, offer = self._rising.allocate(kv_cache_memory_bytes, self.interrupted)
        self.use(engine, offer)
        return offer

    def use(self, engine: DraftEngine, offer: Offer) -> None:
        """Draft with an engine that is up; it asks :meth:`interrupted`."""
        self._engine, self._offer = engine, offer

    def interrupted(self) -> bool:
        """Whether a message from a target waits for the step under way."""
        return any(line.channel.has_input() for line in self._lines)

    # ---- targets

    def serve(self, channel: Channel[DraftBound]) -> None:
        """Draft for the one target that has started this process, until it is gone."""
        self._lines.append(Line(channel, self._from_parent))
        self._run()

    def serve_all(self, listener: Listener) -> None:
        """Draft for all targets that come, until :meth:`stop`; the model is up."""
        self._listener = listener
        self._run()

    def stop(self) -> None:
        """End soon. May be called from a signal handler or another thread."""
        self._stopped.set()

    @property
    def model_name(self) -> str:
        """Of the draft model; empty until it is up."""
        return self._offer.model if self._offer is not None else ""

    def figures(self) -> dict[str, float]:
        """Counters and what is in use, for the metrics; may be called by another thread."""
        figures: dict[str, float] = {
            "targets": self.targets,
            "targets_joined": self._joined,
            "targets_refused": self._refused,
        }
        if self._engine is not None:
            counters = self._engine.counters
            figures |= {**counters, **self._engine.gauges()}
            figures["draft_step_rows"] = counters["draft_rows"]
            figures["draft_rows_in_all"] = self._engine.max_rows
        return figures

    @property
    def connections(self) -> int:
        """Targets that are here, joined or about to; may be called by another thread."""
        return len(self._lines)

    @property
    def targets(self) -> int:
        """How many have joined."""
        return len(self._engine.sessions) if self._engine is not None else 0

    def _from_parent(self, line: Line, message: ToDraft) -> None:
        """The messages with which a target brings up a process of its own."""
        try:
            match message:
                case Setup():
                    self.bring_up(message, lambda what: line.send([Progress(what)]))
                    return
                case Allocate():
                    self.allocate(message.kv_cache_memory_bytes)
                    return
        except Exception as error:  # the target reports whatever vLLM finds wrong
            logger.error("ssd draft: the draft model cannot be brought up", exc_info=error)
            line.send([Failed(f"{type(error).__name__}: {error}")])
            self._rising = None
            return
        self._join(line, message)

    def _join(self, line: Line, message: ToDraft) -> None:
        """The message with which a target joins a draft that is up."""
        engine, offer = self._engine, self._offer
        if engine is None or offer is None or not isinstance(message, Join):
            raise OutOfStepError(f"{type(message).__name__} to a draft that is not up")
        try:
            policy = agree(message, offer)
            if message.stay and self.targets >= self._most_targets:
                raise ValueError(
                    f"the draft serves {self.targets} targets, and no more; end one of them, or "
                    f"start the draft server with --max-targets {self.targets + 1}"
                )
        except ValueError as error:
            self._refused += 1
            self._log_refusal(str(error))
            line.send([Failed(str(error))])
            return
        longest, blocks = offer.max_model_len, engine.allocator.blocks
        ready = Ready(engine.max_rows, blocks.count + 1, blocks.block_size, longest, offer.model)
        if message.stay:
            # A text may hold the target's own ids beyond the draft's, which the model maps to one.
            bounds = Bounds(message.vocab_size, longest, policy.num_speculative_tokens)
            line.serve(engine, engine.open(policy), bounds)
            self._joined += 1
            if self._listener is not None:
                logger.info("ssd draft: a target has joined, %d in all", self.targets)
        line.send([ready])

    def _log_refusal(self, reason: str) -> None:
        """A line, unless it was the last one just now: who is refused comes again soon."""
        now = time.monotonic()
        known, logged_at = self._refusal
        if reason != known or now - logged_at > LOG_AGAIN_SECONDS:
            self._refusal = reason, now
            logger.warning("ssd draft: a target is refused: %s", reason)

    # ---- the loop

    def _run(self) -> None:
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        heart.start()
        try:
            while not self._stopped.is_set() and (self._lines or self._listener is not None):
                self._turn()
        finally:
            self._stopped.set()
            heart.join()
            for line in self._lines.copy():
                self._drop(line, "the draft ends")

    def _turn(self) -> None:
        """Receive, re-plan, publish, decode one step, publish."""
        engine = self._engine
        busy = engine is not None and engine.has_work
        if not busy and not self._wait():
            self._report()  # not between rounds, where a target would read it in ``propose()``
            return
        self._busy = True
        try:
            self._accept()
            heard = self._each(Line.receive)
            if heard:
                self._each(lambda line: line.publish(answers=line in heard))
            engine = self._engine
            if engine is not None and engine.has_work:
                self._step(engine)
                self._each(Line.publish)
                self._report()
        finally:
            self._busy = False

    def _step(self, engine: DraftEngine) -> None:
        """One step."""
        try:
            engine.step()
        except Exception as error:
            self._step_failed(error)
        else:
            self._failed = 0

    def _step_failed(self, error: Exception) -> None:
        """Have all targets of a shared draft begin anew, whoever's error it was."""
        self._failed += 1
        if self._listener is None or self._failed > _MOST_FAILED:
            raise error
        logger.error("ssd draft: a step failed", exc_info=error)
        self._each(lambda line: line.lost("a step failed"))

    def _each(self, act: Callable[[Line], Any]) -> list[Line]:
        """Act on all lines, and drop those that are lost; the lines for which it was true."""
        found = []
        for line in self._lines.copy():
            try:
                if act(line):
                    found.append(line)
            except ConnectionError as error:
                self._drop(line, str(error))
            except StepError as error:
                self._step_failed(error)
            except Exception:
                if self._listener is None:
                    raise
                logger.exception("ssd draft: an error in what one target is served")
                self._drop(line, "an error")
        return found

    def _report(self) -> None:
        now = time.monotonic()
        self._each(lambda line: line.report(now))

    def _wait(self) -> bool:
        """Wait until something arrives; False if nothing has for a while."""
        if self.interrupted():
            return True
        poll = select.poll()
        for line in self._lines:
            poll.register(line.channel, select.POLLIN)
        if self._listener is not None:
            poll.register(self._listener, select.POLLIN)
        forever = self._listener is None and not any(line.unreported for line in self._lines)
        return bool(poll.poll(None if forever else 1e3 * REPORT_SECONDS))

    def _accept(self) -> None:
        """Take the targets that have come."""
        if self._listener is not None:
            for stream in self._listener.accept():
                self._lines.append(Line(peer_channel(stream, ServerBound), self._join))
            # A target may come long before it joins, while it loads; but not any number of them.
            waiting = [line for line in self._lines if not line.joined]
            for line in waiting[: -self._most_targets - _MORE_WAITING]:
                self._drop(line, "too many wait")

    def _drop(self, line: Line, reason: str) -> None:
        self._lines.remove(line)
        joined = line.joined
        line.close()
        if joined:
            logger.info("ssd draft: a target is gone (%s), %d left", reason, self.targets)

    def _beat(self) -> None:
        """Signs of life while a step, or what a target has sent, takes long."""
        while not self._stopped.wait(ALIVE_SECONDS):
            for line in self._lines.copy():
                with suppress(ConnectionError):  # the loop finds out as well
                    line.beat(self._busy)
