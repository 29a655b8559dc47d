"""The draft process's loop: read the target's messages, re-plan, decode one step, publish."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Sequence

from vllm_ssd.core.arms import arms_of
from vllm_ssd.draft.blocks import KVBlocks
from vllm_ssd.draft.engine import DraftEngine, OutOfStepError
from vllm_ssd.draft.forking import Policy
from vllm_ssd.draft.rows import Rows
from vllm_ssd.draft.validation import Bounds, check
from vllm_ssd.draft.vllm_model import VllmDraftModel
from vllm_ssd.wire.channel import Channel, ChannelClosedError
from vllm_ssd.wire.messages import (
    MAX_EPOCH_JUMP,
    Alive,
    Allocate,
    DraftBound,
    Failed,
    Finished,
    Lost,
    Proposed,
    Ready,
    Report,
    Setup,
    Start,
    TargetBound,
    ToDraft,
    ToTarget,
    Trimmed,
    Verified,
    unpack,
)

logger = logging.getLogger("vllm.vllm_ssd.draft")

ALIVE_SECONDS = 0.5
"""During a step longer than this, signs of life are sent."""
REPORT_SECONDS = 0.25
_LOST_SECONDS = 0.05
_MAX_CANDIDATES = 64
_BUSY_CHUNK_FRACTION = 4
"""While others decode, a step prefills at most one in this many of the tokens it could."""


class DraftServer:
    """Serves one target over one channel until it closes.

    Args:
        channel: frames from and to the target.
    """

    def __init__(self, channel: Channel[DraftBound]) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._epoch = -1
        self._expected = 0
        self._broken = False
        self._number = 0
        self._in_step = False
        self._last_sent = time.monotonic()
        self._last_lost = 0.0
        self._last_report = 0.0
        self._unreported = False
        """Whether there were steps since the last report."""
        self._stopped = threading.Event()
        self._setup: Setup | None = None
        self._model: VllmDraftModel | None = None
        self._engine: DraftEngine | None = None
        self._bounds: Bounds | None = None

    def run(self) -> None:
        """Serve until the target closes the channel."""
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        heart.start()
        try:
            while not self._stopped.is_set():
                self._turn()
        except ChannelClosedError:
            logger.info("ssd draft: the target is gone")
        finally:
            self._stopped.set()
            heart.join()
            self._channel.close()

    def _turn(self) -> None:
        """Receive, re-plan, publish, decode one step, publish."""
        engine = self._engine
        busy = engine is not None and engine.has_work
        idle = REPORT_SECONDS if self._unreported else None
        frames = self._channel.receive(0.0 if busy else idle)
        if not frames and not busy:
            self._report()  # not between rounds, where the target would read it in ``propose()``
        for frame in frames:
            self._take(frame)
        if engine is None:
            return
        if frames:
            # Sent even when empty: the target presumes a silent draft hung.
            self._send(engine.publications())
        if engine.has_work:
            self._in_step = True
            messages = engine.step()
            self._in_step = False
            self._unreported = True
            self._send(messages)
            if time.monotonic() - self._last_report > REPORT_SECONDS:
                self._report()

    # ---- frames

    def _take(self, frame: DraftBound | None) -> None:
        """Apply a frame if it is the one expected; ask for a new epoch if one is missing."""
        if frame is None:
            self._lost("a frame that cannot be decoded")
            return
        if frame.epoch > self._epoch + MAX_EPOCH_JUMP:
            self._lost(f"a frame of epoch {frame.epoch}")
            return
        if frame.epoch > self._epoch:
            if self._engine is not None:
                self._engine.reset()
            self._epoch, self._expected, self._number = frame.epoch, 0, 0
            self._broken = False
        late = frame.epoch < self._epoch or frame.number < self._expected
        if late and not self._broken:
            return
        if self._broken or frame.number != self._expected:
            self._lost(f"frame {frame.number} in place of {self._expected}")
            return
        self._expected += 1
        try:
            for message in frame.messages:
                self._handle(message)
        except (OutOfStepError, ValueError, IndexError, OverflowError) as error:
            self._lost(str(error))

    def _lost(self, reason: str) -> None:
        """Ask for a new epoch; the rest of this one is ignored."""
        self._broken = True
        if self._engine is not None:
            self._engine.reset()
        now = time.monotonic()
        if now - self._last_lost > _LOST_SECONDS:
            self._last_lost = now
            logger.warning("ssd draft: out of step with the target (%s)", reason)
            self._send([Lost()])

    def _send(self, messages: Sequence[ToTarget]) -> None:
        with self._lock:
            frame = TargetBound(self._epoch, self._number, list(messages))
            self._number += 1
            self._last_sent = time.monotonic()
            self._channel.send(frame)

    def _beat(self) -> None:
        """Signs of life during steps that take long."""
        while not self._stopped.wait(ALIVE_SECONDS):
            if self._in_step and time.monotonic() - self._last_sent > ALIVE_SECONDS:
                try:
                    self._send([Alive()])
                except ConnectionError:
                    return

    def _report(self) -> None:
        self._unreported = False
        if self._engine is not None:
            self._last_report = time.monotonic()
            steps = self._engine.take_step_seconds().tobytes()
            self._send([Report(dict(self._engine.counters), steps)])

    # ---- messages

    def _handle(self, message: ToDraft) -> None:
        if self._bounds is not None:
            check(message, self._bounds)
        match message:
            case Setup():
                self._set_up(message)
            case Allocate():
                self._allocate(message)
            case _ if self._engine is None:
                raise OutOfStepError("no model yet")
            case Start():
                self._engine.start(message)
            case Verified():
                self._engine.verified(message)
            case Proposed():
                self._engine.proposed(message)
            case Trimmed():
                self._engine.trimmed(message)
            case Finished():
                self._engine.finished(message)

    def _set_up(self, message: Setup) -> None:
        self._setup = message
        try:
            self._model = VllmDraftModel(dict(message.engine_args))
        except Exception as error:  # the target reports whatever vLLM finds wrong
            self._fail(error)

    def _allocate(self, message: Allocate) -> None:
        setup, model = self._setup, self._model
        if setup is None or model is None:
            return
        draft_vocab = unpack(setup.draft_vocab) if setup.draft_vocab else None
        choices = setup.vocab_size if draft_vocab is None else len(draft_vocab)
        candidates = min(setup.max_branches + 1, _MAX_CANDIDATES, choices)
        sampled_from = min(setup.draft_top_n, choices)
        sizes = message.kv_cache_memory_bytes, candidates, setup.vocab_size
        try:
            model.load(*sizes, draft_vocab, sampled_from)
        except Exception as error:  # as above
            self._fail(error)
            return
        max_rows = model.config.scheduler_config.max_num_seqs
        max_tokens = model.config.scheduler_config.max_num_batched_tokens
        policy = Policy(
            setup.num_speculative_tokens,
            tuple(setup.fan_out) or None,
            setup.branches,
            setup.max_branches,
            arms_of(setup.draft_sampling if sampled_from else "greedy", setup.saguaro_c),
        )
        self._engine = DraftEngine(
            model,
            Rows(max_rows, setup.num_speculative_tokens, candidates, sampled_from),
            KVBlocks(model.num_blocks, model.block_size, setup.enable_prefix_caching),
            policy,
            prefill_chunk=max(1, (max_tokens - max_rows) // _BUSY_CHUNK_FRACTION),
            prefill_chunk_idle=max_tokens - max_rows,
            interrupted=self._channel.has_input,
        )
        self._bounds = Bounds(
            setup.vocab_size,
            model.config.model_config.max_model_len,
            setup.num_speculative_tokens,
        )
        # As in vLLM's own processes: no full collection looks at what the model has brought along.
        gc.collect()
        gc.freeze()
        self._send([Ready(max_rows, model.num_blocks, model.block_size)])

    def _fail(self, error: Exception) -> None:
        logger.error("ssd draft: the draft model cannot be brought up", exc_info=error)
        self._send([Failed(f"{type(error).__name__}: {error}")])
