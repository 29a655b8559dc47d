"""Memory of the host that the device reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def shared(
    shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
    """Zeroed host memory, and the view through which the device reads it.

    Raises:
        RuntimeError: the device cannot read host memory.
    """
    if device.type == "cpu":
        tensor = torch.zeros(shape, dtype=dtype)
        return tensor.numpy(), tensor
    from vllm.v1.worker.gpu.buffer_utils import UvaBuffer

    buffer = UvaBuffer(shape, dtype)  # pinned and mapped
    return buffer.np, buffer.uva()
