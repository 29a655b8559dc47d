"""SSDWorker for vLLM's V2 runner: the platform's own worker, plus the draft process."""

from __future__ import annotations

import logging
import platform
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace
from vllm.distributed.parallel_state import get_tp_group
from vllm.platforms import current_platform

from vllm_ssd import compat
from vllm_ssd.core.distributions import dense_bytes
from vllm_ssd.core.stats import Stats
from vllm_ssd.preflight import Checked, check_engine, engine_options
from vllm_ssd.target.beside import DraftBeside
from vllm_ssd.target.cores import take_cores
from vllm_ssd.target.counters import Snapshots, all_counters
from vllm_ssd.target.draft_life import DraftLife
from vllm_ssd.target.requests import RequestTable
from vllm_ssd.target.v2.device_trees import DeviceTrees
from vllm_ssd.target.v2.draft_logits import LARGEST_BYTES, DraftLogits
from vllm_ssd.target.v2.draft_thread import DraftThread
from vllm_ssd.target.v2.follower import Follower
from vllm_ssd.target.v2.outcomes import OutcomeReadback, unpack_outcome
from vllm_ssd.target.v2.proposals import Proposals
from vllm_ssd.target.v2.sampled_drafts import SampledDrafts
from vllm_ssd.target.v2.slots import Slots
from vllm_ssd.target.v2.speculator import Drafts, SSDSpeculator, take_over
from vllm_ssd.target.v2.writer import TreeWriter

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker

if TYPE_CHECKING:
    from vllm_ssd.config import SSDConfig
    from vllm_ssd.core.arrays import Int32Array

logger = logging.getLogger("vllm.vllm_ssd")

_ORDERED = ("x86_64", "AMD64")
"""Machines whose stores are seen in the order of the program: that sampled drafts are exact rests
on it (:class:`.writer.TreeWriter`)."""


class SSDWorker(DraftBeside, PlatformWorker):
    """The platform's worker with a draft beside it (vLLM's ``worker_cls``).

    Only the first tensor-parallel rank has the draft; the others take its drafts.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self._config = engine_options(vllm_config)
        if not vllm_config.use_v2_model_runner:
            raise ValueError(
                "ssd: this worker is for vLLM's V2 model runner, but vLLM takes V1; leave "
                "worker_cls out, or set it to vllm_ssd.target.v1.worker.SSDWorker"
            )
        super().__init__(vllm_config, *args, **kwargs)
        self._sampled_from = _sampled_from(self._config, vllm_config)
        self._checked: Checked | None = None
        if self._has_draft:
            checked = check_engine(vllm_config)
            self._checked = checked if self._sampled_from else _certain(checked)
        length = int(vllm_config.model_config.max_model_len)
        self._requests = RequestTable(length, self._sampled_from)
        self._stats = Stats()
        self._thread: DraftThread | None = None
        self._readback: OutcomeReadback | None = None

    def init_device(self) -> None:
        """Bring up the device, and the draft process beside it."""
        cores: list[int] = []
        if current_platform.is_cpu() and self._config.has_process:
            cores, self._unbind = take_cores(
                self, self._config.draft_cpu_cores, self.parallel_config
            )
        super().init_device()
        compat.check_v2_worker(self)
        several = self.parallel_config.tensor_parallel_size > 1
        group = get_tp_group() if several else None
        self._speculator = SSDSpeculator(
            self._config.num_speculative_tokens,
            self.model_runner.req_states,
            self._stats,
            None if self._checked is None else self._start_draft(self._checked, cores),
            group,
            self._sample_drafts(group) if self._sampled_from else None,
        )
        take_over(self.model_runner, self._speculator)

    def _sample_drafts(self, group: Any) -> SampledDrafts:
        states, depth = self.model_runner.req_states, self._config.num_speculative_tokens
        rows = DraftLogits(
            states.max_num_reqs, depth, states.vocab_size, self._sampled_from, states.device
        )
        return SampledDrafts(rows, states, group)

    def _start_draft(self, checked: Checked, cores: list[int]) -> Drafts:
        """The draft, the thread that has it, and what connects both to the device."""
        states = self.model_runner.req_states
        requests, stats = self._requests, self._stats
        trees = DeviceTrees(
            states.max_num_reqs,
            self._config.num_speculative_tokens,
            states.vocab_size,
            states.device,
            self._sampled_from,
        )
        writer = TreeWriter(trees)
        self._draft = DraftLife(checked, self.vllm_config, stats, requests, cores, writer)
        client = self._draft.client
        snapshots = self._snapshots = Snapshots(stats, lambda: all_counters(stats, client))
        thread = self._thread = DraftThread(
            client, stats, self._config.strict, lambda: snapshots.step_done(last=False)
        )
        follower = Follower(client, writer, requests, stats)

        def deliver(serials: list[int], packed: Int32Array) -> None:
            thread.post(lambda: follower.verified(unpack_outcome(serials, packed)))

        readback = self._readback = OutcomeReadback(states.device, deliver, thread.report)
        # Also when the engine is dropped without a shutdown; the last one is called first.
        weakref.finalize(self, thread.close)
        weakref.finalize(self, readback.close)
        slots = Slots(
            states.max_num_reqs,
            lambda gone, begun: thread.post(lambda: follower.scheduled(gone, begun)),
        )
        return Drafts(
            Proposals(trees, states, from_text=self._config.backup in ("auto", "ngram")),
            slots,
            readback,
            thread,
            lambda cut: thread.post(lambda: follower.trimmed(cut)),
        )

    @property
    def _announced(self) -> RequestTable:
        return self._requests

    def _with_draft(self, call: Callable[[DraftLife], object]) -> None:
        draft, thread = self._draft, self._thread
        if draft is not None and thread is not None:
            thread.ask(lambda: call(draft))

    def determine_available_memory(self) -> int:
        """The target's KV budget, less the draft's share where both use one device."""
        available = super().determine_available_memory()
        draft, thread = self._draft, self._thread
        if draft is None or thread is None:
            return available
        specs = self.get_kv_cache_spec().values()
        return thread.ask(lambda: draft.share_memory(available, lambda: specs))

    def compile_or_warm_up_model(self) -> Any:
        """Warm the target up; then, with its memory taken, let the draft allocate its own."""
        result = super().compile_or_warm_up_model()
        self._with_draft(DraftLife.target_is_ready)
        self._speculator.serving = True
        return result

    def ssd_stats(self) -> dict[str, float]:
        """Counters of this worker's look-ups and of its draft (for ``collective_rpc``)."""
        draft, thread = self._draft, self._thread
        if draft is None or thread is None:
            return {}
        client = draft.client
        # Also lets the thread finish what was posted before.
        return thread.ask(lambda: all_counters(self._stats, client))

    def shutdown(self) -> None:
        """End the draft process and the threads, then the worker."""
        if self._readback is not None:
            self._readback.close()
        if self._thread is not None:
            self._thread.close()
        super().shutdown()


def _sampled_from(config: SSDConfig, vllm_config: Any) -> int:
    """Sampled drafts come from so many tokens; 0: none are sampled."""
    if config.draft_sampling == "greedy":
        return 0
    if platform.machine() not in _ORDERED:
        logger.warning(
            "ssd: no drafts are sampled with the V2 runner on %s, whose processors may reorder "
            "stores; set draft_sampling to 'greedy' to say so",
            platform.machine(),
        )
        return 0
    slots = vllm_config.scheduler_config.max_num_seqs
    vocab_size = vllm_config.model_config.get_vocab_size()
    size = dense_bytes(slots, config.num_speculative_tokens, vocab_size)
    if size <= LARGEST_BYTES:
        return config.draft_top_n
    logger.warning(
        "ssd: no drafts are sampled: their probabilities would take %.1f GiB for max_num_seqs = "
        "%d, and at most %.1f are taken; lower max_num_seqs, or set draft_sampling to 'greedy'",
        size / 2**30,
        slots,
        LARGEST_BYTES / 2**30,
    )
    return 0


def _certain(checked: Checked) -> Checked:
    """The same with greedy drafts."""
    config = checked.config.model_copy(update={"draft_sampling": "greedy"})
    return checked._replace(config=config, join=replace(checked.join, draft_sampling="greedy"))
