"""The proposer: what vLLM asks for drafts, right after sampling, on the critical path."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_ssd.config import ADDITIONAL_CONFIG_KEY, SSDConfig
from vllm_ssd.core.stats import Stats
from vllm_ssd.core.tree import Walk, Where
from vllm_ssd.target.requests import (
    RequestTable,
    Tracked,
    before_min_length,
    can_draft,
    most_drafts,
)
from vllm_ssd.wire.messages import Finished, ToDraft, Trimmed, Verified, pack

if TYPE_CHECKING:
    import numpy as np
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_ssd.target.client import DraftClient

logger = logging.getLogger("vllm.vllm_ssd")

ANNOUNCED_TOKENS = 4 << 20
"""Tokens of text announced in one step (16 MiB): many long requests take turns."""


class LookUp(NamedTuple):
    """One request of the batch that can use a draft."""

    row: int
    """Its row in vLLM's batch."""
    request: Tracked
    confirmed: list[int]
    """Its tokens since the draft was last told."""
    length: int
    """Length of its text now."""
    wanted: int
    """How many drafted tokens it can use."""


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
        self.requests = RequestTable(vllm_config.model_config.max_model_len)
        self.client: DraftClient | None = None
        self._runner: Any = None
        self._announced = 0
        """Tokens of text announced in this step."""
        self._proposed_at: float | None = None
        self._complained = False

    def bind(self, runner: Any, client: DraftClient | None) -> None:
        """Connect to the model runner, and to the draft where this worker's drafts are used.

        Args:
            runner: vLLM's model runner, for request ids and sampling parameters.
            client: the draft's; ``None`` on the other tensor-parallel ranks.
        """
        self._runner = runner
        self.client = client

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

    # ---- before the forward

    def before_forward(self, scheduler_output: SchedulerOutput) -> None:
        """Tell the draft what is about to be computed. Never blocks."""
        client = self.client
        if client is None:
            return
        try:
            client.poll()
            client.maintain()
            client.send(self._notices(scheduler_output))
        except Exception as error:  # nothing of ours may stop the engine
            self._degrade(error)

    def _notices(self, scheduler_output: SchedulerOutput) -> list[ToDraft]:
        client, requests = self.client, self.requests
        assert client is not None
        messages: list[ToDraft] = []
        self._announced = 0
        gone = [requests.forget(req_id) for req_id in scheduler_output.finished_req_ids]
        handles = [request.handle for request in gone if request is not None]
        for new in scheduler_output.scheduled_new_reqs:
            again = requests.forget(new.req_id)
            if again is not None:
                handles.append(again.handle)
            if client.up and can_draft(new) and self._may_announce():
                tokens = new.prompt_token_ids
                self._announced += len(tokens)
                messages.append(
                    requests.announce(new.req_id, tokens, len(tokens), new.sampling_params)
                )
        if handles:
            messages.insert(0, Finished(pack(handles)))
            for handle in handles:
                client.published.drop(handle)
        trimmed = self._trimmed(scheduler_output)
        if trimmed is not None:
            messages.append(trimmed)
        return messages

    def _may_announce(self) -> bool:
        """Whether one more text may go with this step; if not, it is announced in a later one."""
        return self._announced < ANNOUNCED_TOKENS

    def _trimmed(self, scheduler_output: SchedulerOutput) -> Trimmed | None:
        """The requests whose proposals the scheduler cut (token budget, grammar, length)."""
        handles, counts = [], []
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(req_id)
            if request is None or not request.proposed:
                continue
            drafts = scheduled.get(req_id, ())
            # vLLM's place holders are no drafts; padding is verified, but nobody drafted it.
            real = len(drafts) if not drafts or drafts[-1] >= 0 else sum(d >= 0 for d in drafts)
            verified = min(real, len(request.proposed))
            if verified != request.verifying:
                request.verifying = verified
                handles.append(request.handle)
                counts.append(verified)
        return Trimmed(pack(handles), pack(counts)) if handles else None

    # ---- after sampling

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
        proposals: list[list[int]] = [[] for _ in sampled_token_ids]
        if self.client is None:
            return proposals
        try:
            self._propose(proposals, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, began)
            if self.config.pad_misses:
                self._pad(proposals, sampled_token_ids, num_tokens_no_spec)
        except Exception as error:  # as above: decoding goes on plainly
            proposals = [[] for _ in sampled_token_ids]
            self._degrade(error)
        self._proposed_at = time.perf_counter()
        self.stats.proposals += 1
        self.stats.propose_seconds += self._proposed_at - began
        return proposals

    def _propose(
        self,
        proposals: list[list[int]],
        sampled: list[list[int]],
        lengths: np.ndarray[Any, Any],
        texts: np.ndarray[Any, Any],
        now: float,
    ) -> None:
        client, stats = self.client, self.stats
        assert client is not None
        client.poll()
        if not client.up:
            missed = sum(1 for tokens in sampled if tokens)
            stats.rounds += missed
            stats.misses_draft_down += missed
            return
        look_ups, messages = self._look_ups(sampled, lengths, texts)
        verify_us = self._measure_verification(look_ups, now)
        walks = [self._walk(look_up, texts) for look_up in look_ups]
        if self.config.max_wait_ms > 0.0:
            epoch = client.epoch
            self._wait(look_ups, walks, texts, now + self.config.max_wait_ms * 1e-3)
            if client.epoch != epoch:
                # The draft knows nobody any more; the next step announces all requests.
                stats.rounds += len(look_ups)
                stats.misses_resync += len(look_ups)
                return
        for look_up, walk in zip(look_ups, walks, strict=True):
            proposals[look_up.row] = self._answer(look_up, walk)
        if look_ups and client.up:
            messages.append(self._tell(look_ups, verify_us))
        client.send(messages)

    def _measure_verification(self, look_ups: list[LookUp], now: float) -> int:
        """Microseconds since the last proposal, if decoding has been going on since; else 0."""
        going_on = any(look_up.request.look_ups for look_up in look_ups)
        if self._proposed_at is None or not going_on:
            return 0
        seconds = now - self._proposed_at
        self.stats.verify_seconds += seconds
        self.stats.verify_intervals += 1
        return int(seconds * 1e6)

    def _look_ups(
        self,
        sampled: list[list[int]],
        lengths: np.ndarray[Any, Any],
        texts: np.ndarray[Any, Any],
    ) -> tuple[list[LookUp], list[ToDraft]]:
        """The rows that can use a draft; and announcements of those the draft does not know."""
        look_ups: list[LookUp] = []
        messages: list[ToDraft] = []
        req_ids = self._runner.input_batch.req_ids
        for index, tokens in enumerate(sampled):
            if not tokens:
                continue
            req_id, length = req_ids[index], int(lengths[index])
            request = self.requests.get(req_id)
            if request is None or length <= request.length:
                messages += self._announce_again(req_id, texts[index, :length])
                continue
            if request.verifying:
                self.stats.verifications += 1
                self.stats.tokens_drafted += request.verifying
                self.stats.tokens_accepted += min(len(tokens) - 1, request.verifying)
            if not request.ends.isdisjoint(tokens):
                # It is over, as the scheduler is about to find out.
                request.proposed, request.verifying = [], 0
                continue
            confirmed = texts[index, request.length : length].tolist()
            wanted = most_drafts(request, length, self.depth)
            look_ups.append(LookUp(index, request, confirmed, length, wanted))
        return look_ups, messages

    def _announce_again(self, req_id: str, text: np.ndarray[Any, Any]) -> list[ToDraft]:
        """Tell the draft of a request in the middle of its life: it is new to this epoch."""
        client = self.client
        assert client is not None
        state = self._runner.requests[req_id]
        if not can_draft(state):
            return []
        messages: list[ToDraft] = []
        known = self.requests.forget(req_id)
        if known is not None:
            messages.append(Finished(pack([known.handle])))
            client.published.drop(known.handle)
        self.stats.rounds += 1
        self.stats.misses_resync += 1
        if not self._may_announce():
            return messages
        self._announced += len(text)
        messages.append(
            self.requests.announce(req_id, text, state.num_prompt_tokens, state.sampling_params)
        )
        return messages

    def _walk(self, look_up: LookUp, texts: np.ndarray[Any, Any]) -> Walk:
        """Walk the new tokens down the request's tree."""
        client = self.client
        assert client is not None
        tree = client.published.cache.trees.get(look_up.request.handle)
        if tree is None:
            return Walk(Where.UNKNOWN)
        if tree.base == look_up.request.length:
            return client.published.cache.walk(look_up.request.handle, look_up.confirmed)
        # The draft is a round behind: the tokens since its tree was planted are walked again.
        tokens = texts[look_up.row, tree.base : look_up.length].tolist()
        return client.published.cache.walk(look_up.request.handle, tokens)

    def _wait(
        self,
        look_ups: list[LookUp],
        walks: list[Walk],
        texts: np.ndarray[Any, Any],
        deadline: float,
    ) -> None:
        """Wait for the branches that came true until they are complete or the deadline passes."""
        client = self.client
        assert client is not None
        began = time.perf_counter()
        waiting = [i for i, walk in enumerate(walks) if self._may_grow(look_ups[i], walk)]
        if not waiting:
            return
        self.stats.waits += 1
        epoch = client.epoch
        while waiting and client.epoch == epoch:
            remaining = deadline - time.perf_counter()
            if remaining <= 0.0:
                break
            client.poll(remaining)
            for i in waiting:
                walks[i] = self._walk(look_ups[i], texts)
            waiting = [i for i in waiting if self._may_grow(look_ups[i], walks[i])]
        # What arrived meanwhile may have moved the other requests' trees as well.
        walks[:] = [self._walk(look_up, texts) for look_up in look_ups]
        self.stats.wait_seconds += time.perf_counter() - began

    def _may_grow(self, look_up: LookUp, walk: Walk) -> bool:
        """Whether the draft is still working on a better answer for this look-up."""
        client = self.client
        assert client is not None
        request = look_up.request
        if look_up.wanted <= 0 or request.handle in client.published.withdrawn:
            return False
        tree = client.published.cache.trees.get(request.handle)
        behind = tree is None or tree.base < request.length
        if walk.where is Where.FOUND:
            length = int(client.published.cache.length[walk.row])
            if length - walk.offset >= look_up.wanted or client.published.cache.ended[walk.row]:
                return False
            # A row that is as long as it was to be only grows with the next tree.
            is_trunk = tree is not None and walk.row == tree.trunk
            return behind or length <= self.depth + is_trunk * len(request.proposed)
        return behind or walk.where is Where.PENDING

    def _answer(self, look_up: LookUp, walk: Walk) -> list[int]:
        """The draft below the node reached; counts the look-up."""
        client, stats, request = self.client, self.stats, look_up.request
        assert client is not None
        request.look_ups += 1
        found: list[int] = []
        ended = False
        if walk.where is Where.FOUND and look_up.wanted > 0:
            found = client.published.cache.below(walk, look_up.wanted)
            ended = bool(client.published.cache.ended[walk.row])
            if not request.ends.isdisjoint(found):
                # The draft knows the first few of a request's end tokens only.
                ended = True
                del found[next(at for at, token in enumerate(found) if token in request.ends) :]
        request.proposed, request.verifying = found, len(found)
        if look_up.wanted <= 0:
            return found
        first = request.look_ups == 1 and not request.resynced
        stats.rounds += 1
        stats.first_rounds += first
        if found or ended:
            stats.hits += 1
            stats.first_hits += first
            stats.depth_at_hit += len(found)
        elif walk.where is Where.OFF:
            stats.misses_no_branch += 1
        elif request.look_ups == 1 and request.resynced:
            stats.misses_resync += 1
        else:
            stats.misses_not_ready += 1
        return found

    def _tell(self, look_ups: list[LookUp], verify_us: int) -> Verified:
        """Tell the draft what was confirmed and what is proposed."""
        handles, lengths, confirmed, proposed = [], [], [], []
        tokens: list[int] = []
        for look_up in look_ups:
            request = look_up.request
            handles.append(request.handle)
            lengths.append(request.length)
            confirmed.append(len(look_up.confirmed))
            proposed.append(len(request.proposed))
            tokens += look_up.confirmed
            tokens += request.proposed
            request.length = look_up.length
        return Verified(
            pack(handles), pack(lengths), pack(confirmed), pack(proposed), pack(tokens), verify_us
        )

    def _pad(
        self, proposals: list[list[int]], sampled: list[list[int]], lengths: np.ndarray[Any, Any]
    ) -> None:
        """Fill proposals up to the full depth, also those of requests the draft does not know."""
        req_ids = self._runner.input_batch.req_ids
        for row, tokens in enumerate(sampled):
            if not tokens:
                continue
            state = self._runner.requests[req_ids[row]]
            length, params = int(lengths[row]), state.sampling_params
            # Not past the end: a session of streaming input goes on where its text ended.
            depth = self.depth
            if params.max_tokens is not None:
                depth = min(depth, state.num_prompt_tokens + params.max_tokens - 1 - length)
            depth = before_min_length(depth, length, state.num_prompt_tokens + params.min_tokens)
            # Any token is exact; one that repeats needs no other row of the embedding.
            found = proposals[row]
            padding = (found or tokens)[-1:] * (depth - len(found))
            # Not in place: the list is also the request's record of what was drafted.
            proposals[row] = found + padding

    def _degrade(self, error: Exception) -> None:
        """Go on without drafts after an error of ours; one log line, not one a step."""
        if self.config.strict:
            raise error
        self.stats.errors += 1
        if not self._complained:
            self._complained = True
            logger.exception("ssd: error in the plugin; decoding goes on plainly")
        if self.client is not None and self.client.up:
            self.client.resync("an error in the plugin", told=True)
