"""What a step came to, on its way from the device to the thread that tells the draft.

A step's outcome is one tensor, so that leaving is one copy. On a GPU it is copied on a stream of
its own, behind the step but not in its way, and a thread waits for it: the main thread enqueues and
goes on. On CPU there is nothing to wait for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_ssd.core.arrays import Int32Array
from vllm_ssd.core.tree import Where
from vllm_ssd.target.v2.device_trees import DeviceTrees
from vllm_ssd.target.v2.look_up import WHERE, Found


class Row(NamedTuple):
    """One request's part of an outcome."""

    serial: int
    """The request (:class:`vllm_ssd.target.v2.slots.Slots`)."""
    sampled: list[int]
    """The accepted tokens and the one after them; empty while a prompt is being computed."""
    length: int
    """Of its whole text, these tokens included; tells whether an earlier outcome was lost."""
    verified: int
    """How many drafts were verified, which the scheduler decides."""
    proposed: list[int]
    """The drafted tokens that are proposed next."""
    ngram: list[int]
    """The tokens behind them, from the text itself."""
    sampled_drafts: int
    """How many of the drafted tokens are verified by what they were sampled from."""
    filled: int
    """How many more only fill the proposal up."""
    ended: bool
    """Nothing follows them: the draft knows that the text ends."""
    where: Where
    """Where the walk ended that has found them."""


_COUNTS = 8
"""Columns of a packed outcome before its tokens."""


def pack_outcome(
    trees: DeviceTrees,
    found: Found,
    matched: torch.Tensor,
    sampled_drafts: torch.Tensor,
    texts: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    num_sampled: torch.Tensor,
    num_rejected: torch.Tensor,
) -> torch.Tensor:
    """A step's outcome as one tensor of a fixed shape, like the look-up.

    Args:
        trees: where it was looked up.
        found: what is proposed.
        matched: ``[B]`` int32, how many of these tokens are from the text.
        sampled_drafts: ``[B]`` int32, how many are not certain.
        texts: as for the look-up; the sampled tokens are each text's last ones.
        lengths: as there.
        slots: as there.
        num_sampled: as there.
        num_rejected: ``[B]`` int32, how many drafts were verified and not accepted.

    Returns:
        ``[B, 8 + (K + 1) + K]`` int32.
    """
    columns, length = trees.counting[: trees.depth + 1], lengths[slots]
    positions = (length - num_sampled)[:, None] + columns
    positions = positions.clamp(0, texts.shape[1] - 1)
    sampled = texts[slots[:, None], positions]
    of_proposal = [found.drafted, matched, found.ended, found.where, sampled_drafts]
    counts = [num_sampled, num_rejected, length, *of_proposal]
    return torch.cat([torch.stack(counts, dim=1), sampled, found.drafts.int()], dim=1)


def unpack_outcome(serials: list[int], packed: Int32Array) -> list[Row]:
    """The reverse, on the host.

    Args:
        serials: ``[B]``.
        packed: as returned above.
    """
    after = _COUNTS + (packed.shape[1] - _COUNTS + 1) // 2
    depth = packed.shape[1] - after
    return [
        Row(
            serial,
            row[_COUNTS : _COUNTS + row[0]],
            row[2],
            max(0, row[0] - 1 + row[1]),
            row[after : after + row[3]],
            row[after + row[3] : after + row[3] + row[4]],
            row[7],
            depth - row[3] - row[4],
            row[5] != 0,
            WHERE[row[6]],
        )
        for serial, row in zip(serials, packed.tolist(), strict=True)
    ]


class OutcomeReadback:
    """Copies outcomes from the device to the host, in order.

    Args:
        device: where they are.
        deliver: takes the serials and the packed outcome of each step once it is there; on a GPU it
            is called by a thread of its own.
        failed: takes that thread's errors, each of which costs one outcome.
    """

    def __init__(
        self,
        device: torch.device,
        deliver: Callable[[list[int], Int32Array], object],
        failed: Callable[[Exception], object],
    ) -> None:
        self._deliver = deliver
        self._failed = failed
        self._stream: torch.cuda.Stream | None = None
        self._under_way: queue.SimpleQueue[_UnderWay | Callable[[], object] | None]
        self._under_way = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if device.type != "cpu":
            self._stream = torch.cuda.Stream(device)
            self._thread = threading.Thread(
                target=self._deliver_each, name="vllm-ssd-outcomes", daemon=True
            )
            self._thread.start()

    def start(self, serials: list[int], packed: torch.Tensor) -> None:
        """Start to copy an outcome. Never waits.

        Args:
            serials: ``[B]``, whose it is.
            packed: of :func:`pack_outcome`, written by the current stream.
        """
        if self._stream is None:
            self._deliver(serials, packed.numpy())
            return
        step = torch.cuda.current_stream()
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(step)
            host = packed.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event(blocking=True)  # who waits for it sleeps
            arrived.record(self._stream)
        self._under_way.put(_UnderWay(serials, packed, host, arrived))

    def then(self, call: Callable[[], object]) -> None:
        """Have something called once all that was taken is delivered. Never waits."""
        if self._thread is None:
            call()
        else:
            self._under_way.put(call)

    def close(self) -> None:
        """Deliver what is under way, and end the thread."""
        if self._thread is not None:
            self._under_way.put(None)
            if threading.current_thread() is not self._thread:  # a finalizer runs anywhere
                self._thread.join()

    def _deliver_each(self) -> None:
        while (each := self._under_way.get()) is not None:
            try:
                if isinstance(each, _UnderWay):
                    each.arrived.synchronize()
                    self._deliver(each.serials, each.host.numpy())
                else:
                    each()
            except Exception as error:  # no error of the plugin may stop the engine
                self._failed(error)


class _UnderWay(NamedTuple):
    serials: list[int]
    device: torch.Tensor
    """Held until it has been copied."""
    host: torch.Tensor
    arrived: torch.cuda.Event
