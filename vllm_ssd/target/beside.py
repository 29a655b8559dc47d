"""What our workers have in common, whichever model runner the target has."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from vllm_ssd.preflight import Checked
from vllm_ssd.target.counters import Snapshots
from vllm_ssd.target.draft_life import DraftLife
from vllm_ssd.target.orphaned import end_when_orphaned
from vllm_ssd.target.requests import RequestTable


class DraftBeside:
    """Mixed into a worker of vLLM's: the draft sleeps and wakes with the target.

    Only the first tensor-parallel rank has a draft. The others may be on machines that do not have
    its model.
    """

    rank: int
    parallel_config: Any
    _checked: Checked | None
    _draft: DraftLife | None = None
    _snapshots: Snapshots | None = None
    _unbind: weakref.finalize[..., Any] | None = None
    """Undoes the binding to cores."""

    @property
    def _has_draft(self) -> bool:
        """vLLM takes the drafts of the first tensor-parallel rank only."""
        return self.rank % self.parallel_config.tensor_parallel_size == 0

    @property
    def _announced(self) -> RequestTable:
        """The requests announced to the draft."""
        raise NotImplementedError

    def _with_draft(self, call: Callable[[DraftLife], object]) -> None:
        """Call something with the draft, if this rank has one, in the thread that has it."""
        raise NotImplementedError

    def init_device(self) -> None:
        """Bring up the device; from now on the engine ends with what has started it."""
        super().init_device()  # type: ignore[misc]
        if self._has_draft:
            end_when_orphaned()

    def update_max_model_len(self, max_model_len: int) -> None:
        """With ``--max-model-len auto`` the engine lowers it to what the KV cache holds."""
        super().update_max_model_len(max_model_len)  # type: ignore[misc]
        requests = self._announced
        requests.max_length = min(requests.max_length, max_model_len)

    def sleep(self, level: int = 1) -> None:
        """Free the target's memory as vLLM does, and all of the draft's."""
        self._with_draft(lambda draft: draft.sleep())
        super().sleep(level)  # type: ignore[misc]

    def discard(self, tags: tuple[str, ...]) -> None:
        """Free parts of the target's memory as vLLM does, and all of the draft's with its KV."""
        super().discard(tags)  # type: ignore[misc]
        self._with_draft(lambda draft: draft.sleep(tags))

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Bring the target back as vLLM does; once all of it is back, start the draft."""
        super().wake_up(tags)  # type: ignore[misc]
        self._with_draft(lambda draft: draft.wake_up(tags))

    def shutdown(self) -> None:
        """Undo what was done for the draft, which has ended, and end the worker."""
        if self._snapshots is not None:
            self._snapshots.close()
        if self._unbind is not None:
            self._unbind()
        super().shutdown()  # type: ignore[misc]
