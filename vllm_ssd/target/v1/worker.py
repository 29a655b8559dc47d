"""SSDWorker: the platform's own vLLM worker, plus the draft process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.distributed.parallel_state import get_tp_group
from vllm.platforms import current_platform

from vllm_ssd import compat
from vllm_ssd.preflight import Checked, check_engine, engine_options
from vllm_ssd.target.beside import DraftBeside
from vllm_ssd.target.client import DraftClient
from vllm_ssd.target.cores import take_cores
from vllm_ssd.target.counters import Snapshots, all_counters
from vllm_ssd.target.draft_life import DraftLife
from vllm_ssd.target.requests import RequestTable
from vllm_ssd.target.rounds import Rounds
from vllm_ssd.target.v1.handover import HandOver, most_bytes
from vllm_ssd.target.v1.proposer import SSDProposer
from vllm_ssd.target.v1.rejection import RejectionSampler, fix_cpu_rejection_sampler

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class SSDWorker(DraftBeside, PlatformWorker):
    """The platform's worker with a draft beside it (vLLM's ``worker_cls``).

    Only the rank whose drafts vLLM uses has the draft; the others propose nothing.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self._config = engine_options(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        self._checked = check_engine(vllm_config) if self._has_draft else None
        # On CPU ``execute_model`` is the forward: a notice sent after it would come late by all
        # that time. On a GPU it returns once the kernels are queued: a notice sent before it delays
        # their launch, on all tensor-parallel ranks, since they wait for this one.
        self._notifies_first = current_platform.is_cpu()
        self._probability_bytes = 0
        """What the draft's probabilities take of the target's device."""

    def init_device(self) -> None:
        """Bring up the device, and the draft process beside it."""
        cores: list[int] = []
        if current_platform.is_cpu() and self._config.has_process:
            cores, self._unbind = take_cores(
                self, self._config.draft_cpu_cores, self.parallel_config
            )
        super().init_device()
        compat.check_worker(self)
        if current_platform.is_cpu():
            fix_cpu_rejection_sampler()
        runner = self.model_runner
        runner.rejection_sampler = RejectionSampler(
            runner.sampler, runner.speculative_config, runner.device
        )
        proposer = self._proposer
        # Our draft model is elsewhere: vLLM need not keep K positions free for one in this process.
        runner.effective_drafter_max_model_len += self._rounds.depth
        if self._checked is not None:
            self._start_draft(self._checked, cores)
        proposer.bind(runner, self._client, self._make_hand_over())

    def _start_draft(self, checked: Checked, cores: list[int]) -> None:
        rounds = self._rounds
        stats = rounds.stats
        draft = self._draft = DraftLife(checked, self.vllm_config, stats, rounds.requests, cores)
        self._snapshots = Snapshots(
            stats, lambda: all_counters(stats, draft.client, rounds.decisions.as_dict())
        )

    def _make_hand_over(self) -> HandOver | None:
        if self._config.draft_sampling == "greedy":
            return None
        vocab_size = self.vllm_config.model_config.get_vocab_size()
        depth = self._config.num_speculative_tokens
        several = self.parallel_config.tensor_parallel_size > 1
        group = get_tp_group() if several else None
        requests = self.vllm_config.scheduler_config.max_num_seqs
        self._probability_bytes = most_bytes(requests, depth, vocab_size)
        stats = self._rounds.stats
        return HandOver(self.model_runner, depth, vocab_size, requests, stats, group)

    @property
    def _client(self) -> DraftClient | None:
        return None if self._draft is None else self._draft.client

    @property
    def _rounds(self) -> Rounds:
        return self._proposer.rounds

    @property
    def _announced(self) -> RequestTable:
        return self._rounds.requests

    def _with_draft(self, call: Callable[[DraftLife], object]) -> None:
        if self._draft is not None:
            call(self._draft)

    @property
    def _proposer(self) -> SSDProposer:
        proposer = self.model_runner.drafter
        if not isinstance(proposer, SSDProposer):
            raise ValueError(
                f"ssd: worker_cls is SSDWorker but the proposer is {type(proposer).__name__}; set "
                'the speculative "model" to vllm_ssd.target.v1.proposer.SSDProposer'
            )
        return proposer

    def determine_available_memory(self) -> int:
        """The target's KV budget, less the draft's share where both use one device."""
        available = super().determine_available_memory()
        given = self.vllm_config.cache_config.kv_cache_memory_bytes is not None
        if not given and not current_platform.is_cpu():
            available -= self._probability_bytes
        if self._draft is None:
            return available
        return self._draft.share_memory(available, lambda: self.get_kv_cache_spec().values())

    def compile_or_warm_up_model(self) -> Any:
        """Warm the target up; then, with its memory taken, let the draft allocate its own."""
        result = super().compile_or_warm_up_model()
        self._proposer.warmed_up(self.vllm_config)
        self._with_draft(DraftLife.target_is_ready)
        return result

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Compute a step, and announce it to the draft as soon as that delays nothing."""
        if self._notifies_first:
            self._proposer.scheduled(scheduler_output)
        output = super().execute_model(scheduler_output)
        if not self._notifies_first:
            self._proposer.scheduled(scheduler_output)
        if self._snapshots is not None:
            # vLLM runs an empty step once the last request has ended.
            self._snapshots.step_done(last=not scheduler_output.total_num_scheduled_tokens)
        return output

    def ssd_stats(self) -> dict[str, float]:
        """Counters of this worker's proposer and of its draft process (for ``collective_rpc``)."""
        if self._client is None:
            return {}
        self._client.poll()
        rounds = self._rounds
        return all_counters(rounds.stats, self._client, rounds.decisions.as_dict())

    def shutdown(self) -> None:
        """End the draft process, then the worker."""
        if self._client is not None:
            self._client.close()
        super().shutdown()
