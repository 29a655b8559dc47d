"""The proposer, which vLLM calls for drafts right after sampling, on the critical path."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_ssd.config import ADDITIONAL_CONFIG_KEY, SSDConfig
from vllm_ssd.target.lookup import Batch
from vllm_ssd.target.rounds import Rounds
from vllm_ssd.target.v1.handover import HandOver, SparseRows
from vllm_ssd.target.v1.padding import pad, pads
from vllm_ssd.target.v1.scheduled import described, scheduled

if TYPE_CHECKING:
    import numpy as np
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_ssd.target.client import DraftClient


class SSDProposer:
    """vLLM's ``custom_class`` proposer (``vllm/v1/spec_decode/custom_class_proposer.py``).

    Args:
        vllm_config: vLLM's; the options are in ``additional_config["ssd"]``.

    Raises:
        ValueError: an option is wrong.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        config = SSDConfig.parse(vllm_config.additional_config[ADDITIONAL_CONFIG_KEY])
        self.rounds = Rounds(config, vllm_config.model_config.max_model_len)
        self._hand_over: HandOver | None = None
        self._runner: Any = None

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
        if client is not None:
            self.rounds.connect(
                client, lambda req_id, text: described(runner.requests[req_id], req_id, text)
            )

    def warmed_up(self, vllm_config: VllmConfig) -> None:
        """The target is ready to decode: vLLM has resolved its graph mode."""
        graphs = vllm_config.compilation_config.cudagraph_mode
        self.rounds.pads = pads(self.rounds.config.pad_misses, graphs)

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
        hand_over, rounds = self._hand_over, self.rounds
        if hand_over is not None:
            drafts = scheduler_output.scheduled_spec_decode_tokens
            self._hand(hand_over, lambda: hand_over.complete(drafts))
        if rounds.client is None:
            return
        began = time.perf_counter()
        try:
            rounds.scheduled(scheduled(scheduler_output))
        except Exception as error:  # no error of the plugin may stop the engine
            rounds.degrade(error)
        rounds.stats.notices += 1
        rounds.stats.notice_seconds += time.perf_counter() - began

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
        rounds, hand_over = self.rounds, self._hand_over
        if hand_over is not None and not hand_over.is_needed:
            hand_over = None
        proposals: list[list[int]] = [[] for _ in sampled_token_ids]
        if rounds.client is None:
            if hand_over is not None:
                hand_over.receive()
            return proposals
        distributions: SparseRows | None = None
        try:
            lengths = num_tokens_no_spec[: len(proposals)].tolist()
            req_ids = self._runner.input_batch.req_ids
            batch = Batch(req_ids, sampled_token_ids, lengths, token_ids_cpu)
            for each in rounds.propose(batch, began, samples=hand_over is not None):
                proposals[each.row] = each.request.proposed
            if rounds.pads and not rounds.off_for:
                pad(proposals, batch, self._runner.requests, rounds.depth)
            if hand_over is not None:
                distributions = hand_over.collect(proposals, rounds.sources)
        except Exception as error:  # as above: decoding goes on plainly
            proposals = [[] for _ in sampled_token_ids]
            rounds.degrade(error)
        finally:
            # Also after an error: other ranks wait for it.
            if hand_over is not None:
                self._hand(hand_over, lambda: hand_over.give(distributions))
        rounds.proposed(began)
        return proposals

    def _hand(self, hand_over: HandOver, call: Callable[[], None]) -> None:
        """Hand something over; without it, drafts are verified as if they were certain."""
        try:
            call()
        except Exception as error:
            if hand_over.group is not None:
                raise  # ranks that verify by different rules would write different texts
            self.rounds.degrade(error)
