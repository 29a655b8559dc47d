"""The proposer, which vLLM calls for drafts right after sampling, on the critical path."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vllm_ssd.config import ADDITIONAL_CONFIG_KEY, SSDConfig
from vllm_ssd.core.stats import Stats
from vllm_ssd.target.handover import HandOver, SparseRows
from vllm_ssd.target.lookup import Batch, LookUp, answer, choose, growing, look_up
from vllm_ssd.target.notices import Notices
from vllm_ssd.target.padding import pad, pads
from vllm_ssd.target.requests import RequestTable, can_draft

if TYPE_CHECKING:
    import numpy as np
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_ssd.target.client import DraftClient
    from vllm_ssd.wire.messages import ToDraft

logger = logging.getLogger("vllm.vllm_ssd")


class SSDProposer:
    """vLLM's ``custom_class`` proposer (``vllm/v1/spec_decode/custom_class_proposer.py``).

    Args:
        vllm_config: vLLM's; the options are in ``additional_config["ssd"]``.

    Raises:
        ValueError: an option is wrong.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        options = vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]
        self.config = SSDConfig.parse(options)
        self.depth = self.config.num_speculative_tokens
        self.stats = Stats()
        samples = self.config.draft_sampling != "greedy"
        self.requests = RequestTable(
            vllm_config.model_config.max_model_len, self.config.draft_top_n * samples
        )
        self._hand_over: HandOver | None = None
        self.client: DraftClient | None = None
        self._notices: Notices | None = None
        self._runner: Any = None
        self._pads = self.config.pad_misses is True
        self._proposed_at: float | None = None
        self._complained = False

    def bind(
        self, runner: Any, client: DraftClient | None, hand_over: HandOver | None = None
    ) -> None:
        """Connect to the model runner, and to the draft where this worker's drafts are used.

        Args:
            runner: vLLM's model runner, for request ids and sampling parameters.
            client: the draft's; ``None`` on the other tensor-parallel ranks.
            hand_over: takes what drafts were sampled from; ``None`` if none are.
        """
        self._runner = runner
        self._hand_over = hand_over
        self.client = client
        self._notices = None if client is None else Notices(client, self.requests)

    def warmed_up(self, vllm_config: VllmConfig) -> None:
        """The target is ready to decode: vLLM has resolved its graph mode."""
        graphs = vllm_config.compilation_config.cudagraph_mode
        self._pads = pads(self.config.pad_misses, graphs)

    def load_model(self, target_model: Any) -> None:
        """Called by vLLM once the target is loaded; the draft loads in its own process.

        Raises:
            ValueError: the worker is not ours.
        """
        if self._runner is None:
            raise ValueError(
                "ssd: SSDProposer needs its own worker; "
                "set worker_cls (--worker-cls) to vllm_ssd.target.worker.SSDWorker"
            )

    def scheduled(self, scheduler_output: SchedulerOutput) -> None:
        """Announce a step to the draft. Never blocks."""
        client, notices = self.client, self._notices
        hand_over = self._hand_over
        if hand_over is not None:
            drafts = scheduler_output.scheduled_spec_decode_tokens
            self._hand(hand_over, lambda: hand_over.complete(drafts))
        if client is None or notices is None:
            return
        began = time.perf_counter()
        try:
            client.poll()
            client.maintain()
            client.send(notices.scheduled(scheduler_output))
        except Exception as error:  # no error of the plugin may stop the engine
            self._degrade(error)
        self.stats.notices += 1
        self.stats.notice_seconds += time.perf_counter() - began

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray[Any, Any],
        token_ids_cpu: np.ndarray[Any, Any],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Look up what follows each request's new tokens.

        Args:
            sampled_token_ids: per batch row the accepted tokens and the one after them; empty where
                nothing was sampled.
            num_tokens_no_spec: ``[max_num_seqs]`` int32, length of each row's text.
            token_ids_cpu: ``[max_num_seqs, max_model_len]`` int32, the text of each row.
            slot_mappings: not used.

        Returns:
            Per batch row at most ``num_speculative_tokens`` drafted tokens.
        """
        began = time.perf_counter()
        hand_over = self._hand_over
        if hand_over is not None and not hand_over.is_needed:
            hand_over = None
        proposals: list[list[int]] = [[] for _ in sampled_token_ids]
        if self.client is None:
            if hand_over is not None:
                hand_over.receive()
            return proposals
        distributions: SparseRows | None = None
        try:
            lengths = num_tokens_no_spec[: len(proposals)].tolist()
            req_ids = self._runner.input_batch.req_ids
            batch = Batch(req_ids, sampled_token_ids, lengths, token_ids_cpu)
            look_ups = self._round(batch, began)
            for each in look_ups:
                proposals[each.row] = each.request.proposed
            if self._pads:
                pad(proposals, batch, self._runner.requests, self.depth)
            if hand_over is not None:
                distributions = self._collect(hand_over, proposals, look_ups)
        except Exception as error:  # as above: decoding goes on plainly
            proposals = [[] for _ in sampled_token_ids]
            self._degrade(error)
        finally:
            # Also after an error: other ranks wait for it.
            if hand_over is not None:
                self._hand(hand_over, lambda: hand_over.give(distributions))
        self._proposed_at = time.perf_counter()
        self.stats.proposals += 1
        self.stats.propose_seconds += self._proposed_at - began
        return proposals

    def _collect(
        self, hand_over: HandOver, proposals: list[list[int]], look_ups: Sequence[LookUp]
    ) -> SparseRows | None:
        """What the proposals were sampled from; without it, they are verified as certain."""
        client = self.client
        assert client is not None
        try:
            return hand_over.collect(proposals, look_ups, client.published)
        except ValueError as error:
            client.resync(f"a distribution that does not make sense: {error}")
            return None

    def _hand(self, hand_over: HandOver, call: Callable[[], None]) -> None:
        """Hand something over; without it, drafts are verified as if they were certain."""
        try:
            call()
        except Exception as error:
            if hand_over.group is not None:
                raise  # ranks that verify by different rules would write different texts
            self._degrade(error)

    def _round(self, batch: Batch, began: float) -> Sequence[LookUp]:
        """One round: look up, wait, answer, report. Returns the look-ups, answered."""
        client, notices, stats = self.client, self._notices, self.stats
        assert client is not None
        assert notices is not None
        client.poll()
        if not client.up:
            stats.missed("draft_down", sum(1 for tokens in batch.sampled if tokens))
            return ()
        look_ups, unknown = choose(batch, self.requests, self.depth, stats)
        verify_us = self._measure_verification(look_ups, began)
        messages = self._announce_again(unknown, batch)

        look_up(look_ups, batch, client.published)
        if not self._wait(look_ups, batch, began):
            stats.missed("resync", len(look_ups))
            return ()
        answer(look_ups, stats)
        if look_ups:
            messages.append(notices.verified(look_ups, verify_us))
        client.send(messages)
        return look_ups

    def _wait(self, look_ups: list[LookUp], batch: Batch, began: float) -> bool:
        """Wait for the hit branches until they are complete or the time allowed is over.

        Returns:
            False if a new epoch has begun: then the next step announces all requests again.
        """
        client = self.client
        assert client is not None
        if not isinstance(self.config.max_wait_ms, float) or self.config.max_wait_ms <= 0.0:
            return True
        waiting = growing(look_ups, client.published, self.depth)
        if not waiting:
            return True
        deadline = began + self.config.max_wait_ms * 1e-3
        epoch, now = client.epoch, time.perf_counter()
        self.stats.waits += 1
        self.stats.wait_seconds -= now
        while waiting and client.epoch == epoch and now < deadline:
            client.poll(deadline - now)
            look_up(waiting, batch, client.published)
            waiting = growing(waiting, client.published, self.depth)
            now = time.perf_counter()
        # What arrived meanwhile may have changed the other requests' trees as well.
        look_up(look_ups, batch, client.published)
        self.stats.wait_seconds += now
        return client.epoch == epoch

    def _measure_verification(self, look_ups: list[LookUp], now: float) -> int:
        """Microseconds since the last proposal; 0 if no request has been decoding since."""
        going_on = any(each.request.look_ups for each in look_ups)
        if self._proposed_at is None or not going_on:
            return 0
        seconds = now - self._proposed_at
        self.stats.verify_seconds += seconds
        self.stats.verify_intervals += 1
        return int(seconds * 1e6)

    def _announce_again(self, rows: list[int], batch: Batch) -> list[ToDraft]:
        """Announce the requests that the new epoch lacks, if the draft can follow them."""
        assert self._notices is not None
        messages: list[ToDraft] = []
        for row in rows:
            req_id = batch.req_ids[row]
            state = self._runner.requests[req_id]
            if can_draft(state):
                self.stats.missed("resync", 1)
                text = batch.texts[row, : batch.lengths[row]]
                messages += self._notices.announced_again(req_id, text, state)
        return messages

    def _degrade(self, error: Exception) -> None:
        """Go on without drafts after an error of ours; one log line, not one a step."""
        if self.config.strict:
            raise error
        self.stats.errors += 1
        if not self._complained:
            self._complained = True
            logger.exception("ssd: error in the plugin; decoding goes on plainly")
        if self.client is not None and self.client.up:
            self.client.resync("an error in the plugin", logged=True)
