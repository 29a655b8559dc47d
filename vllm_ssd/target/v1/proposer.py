"""The proposer, which vLLM calls for drafts right after sampling, on the critical path."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vllm_ssd.config import ADDITIONAL_CONFIG_KEY, SSDConfig
from vllm_ssd.core.stats import Stats
from vllm_ssd.target.decisions import Decisions
from vllm_ssd.target.lookup import Batch, LookUp, answer, choose, lacking, look_up
from vllm_ssd.target.notices import Notices
from vllm_ssd.target.pace import Pace
from vllm_ssd.target.requests import RequestTable, can_draft
from vllm_ssd.target.v1.handover import HandOver, SparseRows
from vllm_ssd.target.v1.padding import pad, pads
from vllm_ssd.target.waiting import Waiting

if TYPE_CHECKING:
    import numpy as np
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_ssd.target.client import DraftClient
    from vllm_ssd.wire.messages import ToDraft

logger = logging.getLogger("vllm.vllm_ssd")

KEEP_UP_ROUNDS = 16
"""Rounds without speculation after which the draft is told the texts."""


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
        self.pace = Pace()
        self.decisions = Decisions(self.requests, self.pace, self.stats)
        self._waiting = Waiting(self.config, self.stats, self.pace)
        self.client: DraftClient | None = None
        self._notices: Notices | None = None
        self._runner: Any = None
        self._pads = self.config.pad_misses is True
        self._proposed_at: float | None = None
        self._rounds_off = 0
        """Rounds without speculation since the last one with it."""
        self._nonsense = ""
        """What is wrong with a distribution of this round."""
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
                "set worker_cls (--worker-cls) to vllm_ssd.target.v1.worker.SSDWorker"
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
            self.decisions.take_in()
            self.pace.scheduled(scheduler_output)
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
        if hand_over is not None:
            hand_over.begin()
        try:
            lengths = num_tokens_no_spec[: len(proposals)].tolist()
            req_ids = self._runner.input_batch.req_ids
            batch = Batch(req_ids, sampled_token_ids, lengths, token_ids_cpu)
            look_ups = self._round(batch, began)
            for each in look_ups:
                proposals[each.row] = each.request.proposed
            if self._pads and not self._rounds_off:
                pad(proposals, batch, self._runner.requests, self.depth)
            if hand_over is not None:
                distributions = hand_over.collect(proposals)
        except Exception as error:  # as above: decoding goes on plainly
            proposals = [[] for _ in sampled_token_ids]
            self._degrade(error)
        finally:
            # Also after an error: other ranks wait for it.
            if hand_over is not None:
                self._hand(hand_over, lambda: hand_over.give(distributions))
        if self._nonsense:
            # Now that this round's messages are under way.
            self.client.resync(f"a distribution that does not make sense: {self._nonsense}")
            self._nonsense = ""
        self._proposed_at = time.perf_counter()
        self.stats.proposals += 1
        self.stats.propose_seconds += self._proposed_at - began
        return proposals

    def _hand(self, hand_over: HandOver, call: Callable[[], None]) -> None:
        """Hand something over; without it, drafts are verified as if they were certain."""
        try:
            call()
        except Exception as error:
            if hand_over.group is not None:
                raise  # ranks that verify by different rules would write different texts
            self._degrade(error)

    def _round(self, batch: Batch, began: float) -> Sequence[LookUp]:
        """One round: look up, answer, report; wait between, where that pays.

        Returns:
            The look-ups, answered.
        """
        client, notices, stats = self.client, self._notices, self.stats
        assert client is not None
        assert notices is not None
        client.poll()
        if not client.up:
            stats.missed("draft_down", sum(1 for tokens in batch.sampled if tokens))
            self.decisions.interrupted()
            return ()
        if not self.decisions.speculates(batch, began, self._proposed_at):
            if self._rounds_off % KEEP_UP_ROUNDS == 0:
                self._keep_up(batch)
            self._rounds_off += 1
            return ()
        self._rounds_off = 0
        look_ups, unknown = choose(batch, self.requests, self.depth, stats)
        verify_us = self._measure_verification(look_ups, began)
        messages = self._announce_again(unknown, batch)

        look_up(look_ups, batch, client.published)
        short = lacking(look_ups)
        if short and not self._waiting.for_branches(look_ups, batch, client, began):
            stats.missed("resync", len(look_ups))
            return ()
        self.decisions.begin(look_ups)
        waited = self._waiting.begin(short, client) if short else []
        at_once = [each for each in look_ups if each.before is None] if waited else look_ups
        self._answer(at_once)
        if short:
            self._waiting.prolong([each for each in short if each.before is None], batch)
        if look_ups:
            messages.append(notices.verified(look_ups, verify_us, price=self._price_for_others()))
        client.send(messages)
        if waited and not self._propose_later(waited, batch, began):
            stats.missed("resync", len(waited))
            return ()
        return look_ups

    def _price_for_others(self) -> float:
        """What a request's drafted token costs the other requests of the batch, in tokens."""
        if self._pads or not self.pace.requests:
            return 0.0  # padding is verified as well: a token more costs nothing
        return self.pace.price * (1.0 - 1.0 / self.pace.requests)

    def _answer(self, look_ups: Sequence[LookUp]) -> None:
        """Decide what is proposed of what was found."""
        if not self._pads:
            # Padded, a verification takes the same time however many of its tokens were drafted.
            self.decisions.choose(look_ups)
        answer(look_ups, self.stats)
        if self._hand_over is not None and self._hand_over.is_needed:
            self._read(self._hand_over, look_ups)

    def _read(self, hand_over: HandOver, look_ups: Sequence[LookUp]) -> None:
        """Read what the proposals were sampled from; without it, they are verified as certain."""
        client = self.client
        assert client is not None
        try:
            hand_over.read(look_ups, client.published)
        except ValueError as error:
            hand_over.begin()
            self._nonsense = str(error)

    def _propose_later(self, waited: list[LookUp], batch: Batch, began: float) -> bool:
        """Wait for more of some requests' trunks, then answer these; False in a new epoch."""
        client, notices = self.client, self._notices
        assert client is not None
        assert notices is not None
        if not self._waiting.wait(waited, batch, client, began):
            return False
        self._answer(waited)
        self._waiting.prolong(waited, batch)
        client.send([notices.proposed(waited)])
        return True

    def _keep_up(self, batch: Batch) -> None:
        """Tell the draft the texts, and that nothing is proposed."""
        client, notices = self.client, self._notices
        assert client is not None
        assert notices is not None
        look_ups, unknown = choose(batch, self.requests, self.depth, self.stats)
        for each in look_ups:
            each.request.proposed, each.request.verifying = [], 0
            each.request.origin = None
            each.request.look_ups += 1
        messages = self._announce_again(unknown, batch)
        if look_ups:
            messages.append(notices.verified(look_ups, 0, speculate=False))
        client.send(messages)

    def _measure_verification(self, look_ups: list[LookUp], now: float) -> int:
        """Microseconds since the last proposal; 0 if no request has been decoding since."""
        going_on = any(each.request.look_ups for each in look_ups)
        if self._proposed_at is None or not going_on:
            return 0
        seconds = now - self._proposed_at
        self.stats.verify_seconds += seconds
        self.stats.verify_intervals += 1
        self.stats.recent["verify_seconds"].add(seconds)
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
        self.decisions.interrupted()
        if not self._complained:
            self._complained = True
            logger.exception("ssd: error in the plugin; decoding goes on plainly")
        if self.client is not None and self.client.up:
            self.client.resync("an error in the plugin", logged=True)
