"""The runner's request slots: who is in which, told where slots are given and taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData

NOBODY = -1


class Begun(NamedTuple):
    """A request has got a slot. One that was preempted begins again, under another serial."""

    serial: int
    """Never used again, unlike slots and, after a preemption, vLLM's ids."""
    slot: int
    request: NewRequestData
    """Its text so far is in ``prefill_token_ids``."""


class Slots:
    """Numbers the requests; called by the main thread alone.

    Args:
        max_slots: of the runner.
        tell: takes the serials of those that have gone and the ones that have begun.
    """

    def __init__(self, max_slots: int, tell: Callable[[list[int], list[Begun]], object]) -> None:
        self._tell = tell
        self._next = 0
        self._of_slot = [NOBODY] * max_slots
        self._slots: dict[str, int] = {}
        """By vLLM's request id."""
        self._gone: list[int] = []

    def free(self, req_ids: Iterable[str]) -> None:
        """These requests have finished or were preempted, if they had slots."""
        for req_id in req_ids:
            slot = self._slots.pop(req_id, None)
            if slot is not None:
                self._gone.append(self._of_slot[slot])
                self._of_slot[slot] = NOBODY

    def fill(self, new: Sequence[NewRequestData], slots: dict[str, int]) -> None:
        """These requests have begun; tells of them, and of those freed before.

        Args:
            new: the requests; one that is there already (streamed input) begins again.
            slots: the runner's slots, by request id.
        """
        self.free(request.req_id for request in new)
        begun = []
        for request in new:
            slot = self._slots[request.req_id] = slots[request.req_id]
            self._of_slot[slot] = self._next
            begun.append(Begun(self._next, slot, request))
            self._next += 1
        gone, self._gone = self._gone, []
        if gone or begun:
            self._tell(gone, begun)

    def serial(self, req_id: str) -> int:
        """A request's, by vLLM's id; :data:`NOBODY` if it has no slot."""
        slot = self._slots.get(req_id)
        return NOBODY if slot is None else self._of_slot[slot]

    def serials(self, slots: Any) -> list[int]:
        """Who is in these slots; :data:`NOBODY` where none is.

        Args:
            slots: ``[B]``, an array of integers.
        """
        return [self._of_slot[slot] for slot in slots.tolist()]
