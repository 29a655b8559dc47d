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
        tokens, probabilities = self.tokens.numpy(), self.probabilities.numpy()
        if self.proposals is None:
            return Choices.firsts(tokens, probabilities)
        return Choices(tokens, probabilities, self.next_tokens.numpy(), self.proposals.numpy())

    def copied(self) -> Chosen:
        """The same in pinned memory of the host, as soon as the current stream is done."""
        tokens = self.tokens.to("cpu", non_blocking=True)
        probabilities = self.probabilities.to("cpu", non_blocking=True)
        if self.proposals is None:
            return Chosen(tokens, probabilities, tokens[:, 0], None)
        next_tokens = self.next_tokens.to("cpu", non_blocking=True)
        proposals = self.proposals.to("cpu", non_blocking=True)
        return Chosen(tokens, probabilities, next_tokens, proposals)


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
            self._host = chosen.copied()
            self._done.record()

    def result(self) -> Choices:
        """See :class:`vllm_ssd.draft.model.Ticket`."""
        self._done.synchronize()
        return self._host.on_host()
