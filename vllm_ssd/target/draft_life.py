"""The life of the draft beside its target: start, memory, sleep and end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from vllm_ssd.core.stats import Stats
from vllm_ssd.preflight import Checked
from vllm_ssd.target.attachment import ATTACH_SECONDS, Attachment, server_of
from vllm_ssd.target.client import DraftClient
from vllm_ssd.target.draft_setup import DraftPlan, plan_draft
from vllm_ssd.target.memory import target_kv_bytes_per_token
from vllm_ssd.target.process import DraftProcess
from vllm_ssd.target.requests import RequestTable
from vllm_ssd.wire.messages import Ready

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec

SERVER_SECONDS = 5.0
"""How long a start waits for a draft server; it may come later."""

SLEEP_TAGS = ("weights", "kv_cache")
"""What vLLM puts to sleep (``vllm/v1/executor/abstract.py``) and may wake one at a time."""


class Rounds(Protocol):
    """What a draft is for."""

    @property
    def requests(self) -> RequestTable:
        """Those announced to it."""

    @property
    def stats(self) -> Stats:
        """Counters."""


class DraftLife:
    """Starts a draft process or connects to a server, as the options say.

    Args:
        checked: the options and the draft, checked.
        vllm_config: the target's.
        rounds: which the draft is for.
        cores: CPU cores of a draft process; empty for wherever the system puts it.
    """

    def __init__(
        self, checked: Checked, vllm_config: Any, rounds: Rounds, cores: list[int]
    ) -> None:
        self._config = checked.config
        self._vllm_config = vllm_config
        self._rounds = rounds
        self._plan: DraftPlan | None = None
        """Of a process of the target's own."""
        self._asleep: set[str] = set()
        """What vLLM has put to sleep, by its tags."""
        if self._config.has_process:
            self.client = self._start(checked, cores)
        else:
            self.client = self._attach(checked)

    def _start(self, checked: Checked, cores: list[int]) -> DraftClient:
        """A draft process of our own."""
        plan = self._plan = plan_draft(checked, self._vllm_config)
        requests = self._rounds.requests
        requests.max_length = plan.max_model_len
        client = DraftClient(
            lambda: DraftProcess(cores, plan.device),
            checked.join,
            self._config.draft_startup_timeout_s,
            self._rounds.stats,
            requests.forget_all,
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
        requests, target = self._rounds.requests, self._vllm_config.model_config

        def agreed(ready: Ready) -> None:
            requests.max_length = min(int(target.max_model_len), ready.max_model_len)

        client = DraftClient(
            reach,
            checked.join,
            timeout_s,
            self._rounds.stats,
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

            plan = plan_draft(checked, self._vllm_config)
            actor = actor_of(checked, plan, self._vllm_config)
            timeout_s = self._config.draft_startup_timeout_s
            return lambda: Attachment(f"draft actor {actor.name}", actor.find), timeout_s
        where = server_of(self._config)
        return lambda: Attachment(f"draft server {where[0]}", lambda _: where), ATTACH_SECONDS

    def share_memory(self, available: int, specs: Callable[[], Iterable[KVCacheSpec]]) -> int:
        """Give the draft its part of the device's memory, where both use one.

        Args:
            available: bytes that vLLM found for the target's KV cache.
            specs: the target's layers.

        Returns:
            Bytes that are left to the target.

        Raises:
            ValueError: nothing would be left.
        """
        if self._plan is None:
            return available
        per_token = target_kv_bytes_per_token(specs(), self._vllm_config)
        self._plan.share_memory(available, per_token)
        if self.client.link is None:
            self.client.launch()
        return available - self._plan.taken_from_target

    def target_is_ready(self) -> None:
        """The target has taken its memory: let the draft allocate its own, and wait for it.

        Raises:
            RuntimeError: a draft process did not come up.
        """
        if self._config.draft_address is not None:
            self.client.wait_for_answer(SERVER_SECONDS)
            return
        if self._plan is not None and self._plan.shares_device:
            self.client.allocate(self._plan.kv_cache_memory_bytes)
        self.client.wait_until_up()

    def sleep(self, tags: Iterable[str] = SLEEP_TAGS) -> None:
        """vLLM frees parts of the target's memory: free all of the draft's with the target's KV."""
        freed = set(tags)
        self._asleep |= freed
        if "kv_cache" in freed:
            self.client.sleep()

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """vLLM has brought parts of the target back: once all of it is, start the draft."""
        self._asleep -= set(SLEEP_TAGS if tags is None else tags)
        if not self._asleep:
            self.client.wake_up()
