"""A step's result on its way from the device."""

from __future__ import annotations

import torch

from vllm_ssd.draft.model import Choices


class Readback:
    """A result on its way to the host, on a stream of its own so that the next forward runs.

    vLLM's ``AsyncGPUModelRunnerOutput`` does the same.

    Args:
        tokens: ``[n, C]``, the chosen ones on the device.
        probabilities: ``[n, C]``, theirs.
        stream: the stream of the copy.
    """

    def __init__(
        self, tokens: torch.Tensor, probabilities: torch.Tensor, stream: torch.cuda.Stream
    ) -> None:
        self._device = tokens, probabilities  # not to be reused before the copy is done
        self._done = torch.cuda.Event(blocking=True)
        forward = torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            stream.wait_stream(forward)
            self._tokens = tokens.to("cpu", non_blocking=True)  # pinned
            self._probabilities = probabilities.to("cpu", non_blocking=True)
            self._done.record()

    def result(self) -> Choices:
        """See :class:`vllm_ssd.draft.model.Ticket`."""
        self._done.synchronize()
        return Choices(self._tokens.numpy(), self._probabilities.numpy())
