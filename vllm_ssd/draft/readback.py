"""The result of a forward, on the device and on its way to the host."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_ssd.draft.model import Choices


class Chosen(NamedTuple):
    """:class:`Choices` on the device."""

    tokens: torch.Tensor
    probabilities: torch.Tensor
    next_tokens: torch.Tensor
    proposals: torch.Tensor | None

    def on_host(self) -> Choices:
        """The same as arrays; they lie on the host already."""
        proposals = None if self.proposals is None else self.proposals.numpy()
        return Choices(
            self.tokens.numpy(),
            self.probabilities.numpy(),
            self.next_tokens.contiguous().numpy(),
            proposals,
        )


class Readback:
    """A result on its way to the host, on a stream of its own so that the next forward runs.

    vLLM's ``AsyncGPUModelRunnerOutput`` does the same.

    Args:
        chosen: the result on the device.
        stream: the stream of the copy.
    """

    def __init__(self, chosen: Chosen, stream: torch.cuda.Stream) -> None:
        self._device = chosen  # not to be reused before the copy is done
        self._done = torch.cuda.Event(blocking=True)
        forward = torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            stream.wait_stream(forward)
            # Into pinned memory.
            self._host = Chosen(
                *(None if part is None else part.to("cpu", non_blocking=True) for part in chosen)
            )
            self._done.record()

    def result(self) -> Choices:
        """See :class:`vllm_ssd.draft.model.Ticket`."""
        self._done.synchronize()
        return self._host.on_host()
