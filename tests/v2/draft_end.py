"""The draft's end of a link, spoken by a test."""

from __future__ import annotations

import socket
from collections.abc import Callable

from vllm_ssd.core.stats import Stats
from vllm_ssd.target.client import DraftClient
from vllm_ssd.target.published import PublishedTrees
from vllm_ssd.wire.channel import Channel
from vllm_ssd.wire.messages import PROTOCOL, DraftBound, Join, Ready, TargetBound, ToDraft, ToTarget

JOIN = Join(PROTOCOL, "", 512, 3, [], 0, 4)
"""K = 3, 512 tokens."""


class DraftEnd:
    """A link over a real socket pair (:class:`vllm_ssd.target.links.link.Link`)."""

    pid = exit_code = failure = None

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.channel: Channel[TargetBound] = Channel(ours, TargetBound)
        self._own: Channel[DraftBound] = Channel(theirs, DraftBound)
        self._number = 0
        self._epoch = 1

    def says(self, *messages: ToTarget) -> None:
        self._own.send(TargetBound(self._epoch, self._number, list(messages)))
        self._number += 1

    def hears(self, seconds: float = 1.0) -> list[ToDraft]:
        """The messages that have arrived."""
        frames = [frame for frame in self._own.receive(seconds) if frame is not None]
        for frame in frames:
            if frame.epoch != self._epoch:
                self._epoch, self._number = frame.epoch, 0
        return [message for frame in frames for message in frame.messages]

    def dies(self) -> None:
        self._own.close()

    def wait(self, timeout: float) -> None:
        """It is dead."""

    def end(self) -> None:
        self.channel.close()


def client_of(
    draft: DraftEnd,
    stats: Stats,
    forget_requests: Callable[[], None],
    published: PublishedTrees | None = None,
) -> DraftClient:
    """A client whose draft is on its way up."""
    client = DraftClient(lambda: draft, JOIN, 60.0, stats, forget_requests, published=published)
    client.launch()
    assert draft.hears() == [JOIN]
    draft.says(Ready(max_rows=64, num_blocks=8, block_size=32))
    return client
