"""SSDWorker: the platform's own vLLM worker, plus the draft process."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.distributed.parallel_state import get_tp_group
from vllm.platforms import current_platform

from vllm_ssd import affinity, compat
from vllm_ssd.core.stats import add_draft_ratios
from vllm_ssd.preflight import Checked, check_engine, engine_options
from vllm_ssd.stats_file import Snapshot, Writer
from vllm_ssd.target.client import DraftClient
from vllm_ssd.target.cores import bind_target, split_cores
from vllm_ssd.target.draft_setup import DraftPlan, plan_draft
from vllm_ssd.target.links.attachment import ATTACH_SECONDS, Attachment, server_of
from vllm_ssd.target.links.process import DraftProcess
from vllm_ssd.target.memory import target_kv_bytes_per_token
from vllm_ssd.target.v1.handover import HandOver, most_bytes
from vllm_ssd.target.v1.proposer import SSDProposer
from vllm_ssd.target.v1.rejection import RejectionSampler, fix_cpu_rejection_sampler
from vllm_ssd.wire.messages import Ready

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker

SNAPSHOT_SECONDS = 0.25
"""From one writing of the counters to the next at least."""
SERVER_SECONDS = 5.0
"""How long a start waits for a draft server; it may come later."""
AFTER_AN_ERROR_SECONDS = 60.0
"""The same after one that failed."""
logger = logging.getLogger("vllm.vllm_ssd")

SLEEP_TAGS = ("weights", "kv_cache")
"""What vLLM puts to sleep (``vllm/v1/executor/abstract.py``) and may wake one at a time."""

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class SSDWorker(PlatformWorker):
    """The platform's worker with a draft beside it (vLLM's ``worker_cls``).

    Only the rank whose drafts vLLM uses has the draft; the others propose nothing.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self._config = engine_options(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        # The others may be on machines that do not have the draft model.
        self._checked = check_engine(vllm_config) if self._drafts_are_used else None
        self._client: DraftClient | None = None
        self._plan: DraftPlan | None = None
        self._unbind: weakref.finalize[..., SSDWorker] | None = None
        # On CPU ``execute_model`` is the forward: a notice sent after it would come late by all
        # that time. On a GPU it returns once the kernels are queued: a notice sent before it delays
        # their launch, on all tensor-parallel ranks, since they wait for this one.
        self._notifies_first = current_platform.is_cpu()
        self._probability_bytes = 0
        """What the draft's probabilities take of the target's device."""
        self._stats_file = Writer()
        self._next_snapshot = 0.0
        """When the counters are written next, if a server wants them."""
        self._asleep: set[str] = set()
        """What vLLM has put to sleep, by its tags."""

    def init_device(self) -> None:
        """Bring up the device, and the draft process beside it."""
        cores: list[int] = []
        if current_platform.is_cpu() and self._config.has_process:
            in_process = self.parallel_config.distributed_executor_backend == "uni"
            split = split_cores(
                self._config.draft_cpu_cores, in_process, self.parallel_config.world_size
            )
            if split.target is not None and bind_target(split.target):
                # Also if the engine fails to start and is never shut down.
                self._unbind = weakref.finalize(self, affinity.unbind)
            cores = split.draft
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
        self.model_runner.effective_drafter_max_model_len += proposer.depth
        if self._checked is not None:
            if self._config.has_process:
                self._client = self._start_draft(self._checked, cores)
            else:
                self._client = self._attach(self._checked)
        proposer.bind(self.model_runner, self._client, self._make_hand_over())

    def _start_draft(self, checked: Checked, cores: list[int]) -> DraftClient:
        """A draft process of our own."""
        plan = self._plan = plan_draft(checked, self.vllm_config)
        proposer = self._proposer
        proposer.requests.max_length = plan.max_model_len
        client = DraftClient(
            lambda: DraftProcess(cores, plan.device),
            checked.join,
            self._config.draft_startup_timeout_s,
            proposer.stats,
            proposer.requests.forget_all,
            plan.setup,
        )
        if plan.may_start_early:
            client.launch()
        if not plan.shares_device:
            # No memory is shared: the draft loads while the target does.
            client.allocate(plan.kv_cache_memory_bytes)
        return client

    def _attach(self, checked: Checked) -> DraftClient:
        """A draft server at an address, or where Ray puts it."""
        reach, timeout_s = self._way(checked)
        requests = self._proposer.requests

        def agreed(ready: Ready) -> None:
            requests.max_length = min(self._longest, ready.max_model_len)

        client = DraftClient(
            reach,
            checked.join,
            timeout_s,
            self._proposer.stats,
            requests.forget_all,
            agreed=agreed,
            starts_server=self._config.draft_placement == "ray",
        )
        client.launch()
        return client

    def _way(self, checked: Checked) -> tuple[Callable[[], Attachment], float]:
        """What connects to the server, and how many seconds it may take until it is joined."""
        if self._config.draft_placement == "ray":
            from vllm_ssd.on_ray.finding import actor_of

            actor = actor_of(checked, plan_draft(checked, self.vllm_config), self.vllm_config)
            timeout_s = self._config.draft_startup_timeout_s
            return lambda: Attachment(f"draft actor {actor.name}", actor.find), timeout_s
        where = server_of(self._config)
        return lambda: Attachment(f"draft server {where[0]}", lambda _: where), ATTACH_SECONDS

    @property
    def _longest(self) -> int:
        """Longest text of the target."""
        return int(self.vllm_config.model_config.max_model_len)

    def _make_hand_over(self) -> HandOver | None:
        if self._config.draft_sampling == "greedy":
            return None
        vocab_size = self.vllm_config.model_config.get_vocab_size()
        depth = self._config.num_speculative_tokens
        several = self.parallel_config.tensor_parallel_size > 1
        group = get_tp_group() if several else None
        requests = self.vllm_config.scheduler_config.max_num_seqs
        self._probability_bytes = most_bytes(requests, depth, vocab_size)
        stats = self._proposer.stats
        return HandOver(self.model_runner, depth, vocab_size, requests, stats, group)

    @property
    def _proposer(self) -> SSDProposer:
        proposer = self.model_runner.drafter
        if not isinstance(proposer, SSDProposer):
            raise ValueError(
                f"ssd: worker_cls is SSDWorker but the proposer is {type(proposer).__name__}; set "
                'the speculative "model" to vllm_ssd.target.v1.proposer.SSDProposer'
            )
        return proposer

    @property
    def _drafts_are_used(self) -> bool:
        """vLLM takes the drafts of the first tensor-parallel rank only."""
        return self.rank % self.parallel_config.tensor_parallel_size == 0

    def determine_available_memory(self) -> int:
        """The target's KV budget, less the draft's share where both use one device."""
        available = super().determine_available_memory()
        given = self.vllm_config.cache_config.kv_cache_memory_bytes is not None
        if not given and not current_platform.is_cpu():
            available -= self._probability_bytes
        if self._plan is None or self._client is None:
            return available
        target = target_kv_bytes_per_token(self.get_kv_cache_spec().values(), self.vllm_config)
        self._plan.share_memory(available, target)
        if self._client.link is None:
            self._client.launch()
        return available - self._plan.taken_from_target

    def update_max_model_len(self, max_model_len: int) -> None:
        """With ``--max-model-len auto`` the engine lowers it to what the KV cache holds."""
        super().update_max_model_len(max_model_len)
        requests = self._proposer.requests
        requests.max_length = min(requests.max_length, max_model_len)

    def compile_or_warm_up_model(self) -> Any:
        """Warm the target up; then, with its memory taken, let the draft allocate its own."""
        result = super().compile_or_warm_up_model()
        self._proposer.warmed_up(self.vllm_config)
        if self._client is not None and self._config.draft_address is None:
            if self._plan is not None and self._plan.shares_device:
                self._client.allocate(self._plan.kv_cache_memory_bytes)
            self._client.wait_until_up()
        elif self._client is not None:
            self._client.wait_for_answer(SERVER_SECONDS)
        return result

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Compute a step, and announce it to the draft as soon as that delays nothing."""
        if self._notifies_first:
            self._proposer.scheduled(scheduler_output)
        output = super().execute_model(scheduler_output)
        if not self._notifies_first:
            self._proposer.scheduled(scheduler_output)
        # vLLM runs an empty step once the last request has ended: what is written then stays.
        last = not scheduler_output.total_num_scheduled_tokens
        wait = self._next_snapshot - time.monotonic()  # longer after an error
        if self._client is not None and wait <= SNAPSHOT_SECONDS * last:
            self._write_snapshot(self._client)
        return output

    def _write_snapshot(self, client: DraftClient) -> None:
        """Write the counters, if a server has asked for them."""
        self._next_snapshot = time.monotonic() + SNAPSHOT_SECONDS
        if not self._stats_file.wanted:
            return
        stats = self._proposer.stats
        counters = {name: float(value) for name, value in self._counters(client).items()}
        counts = {kind: values.count for kind, values in stats.recent.items()}
        values = {kind: values.since(0) for kind, values in stats.recent.items()}
        try:
            self._stats_file.write(Snapshot(counters, counts, values, stats.depths))
        except OSError as error:
            self._next_snapshot += AFTER_AN_ERROR_SECONDS
            logger.warning("ssd: the metrics could not be written: %s", error)

    def sleep(self, level: int = 1) -> None:
        """Free the target's memory as vLLM does, and all of the draft's."""
        if self._client is not None:
            self._client.sleep()
        super().sleep(level)
        self._asleep = set(SLEEP_TAGS)

    def discard(self, tags: tuple[str, ...]) -> None:
        """Free parts of the target's memory as vLLM does, and all of the draft's with its KV."""
        super().discard(tags)
        self._asleep |= set(tags)
        if self._client is not None and "kv_cache" in tags:
            self._client.sleep()

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Bring the target back as vLLM does; once all of it is back, start the draft."""
        super().wake_up(tags)
        self._asleep -= set(SLEEP_TAGS if tags is None else tags)
        if self._client is not None and not self._asleep:
            self._client.wake_up()

    def ssd_stats(self) -> dict[str, float]:
        """Counters of this worker's proposer and of its draft process (for ``collective_rpc``)."""
        if self._client is None:
            return {}
        self._client.poll()
        return self._counters(self._client)

    def _counters(self, client: DraftClient) -> dict[str, float]:
        return {
            **self._proposer.stats.as_dict(),
            **self._proposer.decisions.as_dict(),
            **add_draft_ratios(client.draft_counters),
            **(client.draft_gauges if client.up else {}),
            "draft_up": float(client.up),
        }

    def shutdown(self) -> None:
        """End the draft process, undo the binding to cores made in-process, end the worker."""
        if self._client is not None:
            self._client.close()
            self._stats_file.remove()
        if self._unbind is not None:
            self._unbind()
        super().shutdown()
