"""How a draft is reached: what the target's client needs to know of it.

A draft is a process of the target's own (:class:`vllm_ssd.target.links.process.DraftProcess`) or a
server at an address (:class:`vllm_ssd.target.links.attachment.Attachment`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vllm_ssd.wire.channel import Channel
from vllm_ssd.wire.messages import TargetBound


class Link(Protocol):
    """A way to one draft, on its way up or open. ``str()`` of it names the draft for the log."""

    @property
    def channel(self) -> Channel[TargetBound] | None:
        """None until it is open."""

    @property
    def failure(self) -> str | None:
        """Why it will never be open."""

    @property
    def pid(self) -> int | None:
        """Of a process of the target's own."""

    @property
    def exit_code(self) -> int | None:
        """Of that process; None while it runs."""

    def wait(self, timeout: float) -> None:
        """Wait until that process has ended."""

    @property
    def end(self) -> Callable[[], object]:
        """Ends the link without waiting, and a process of its own."""
