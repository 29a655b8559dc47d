"""Where the host waits for the device: torch's warnings, by the code that is to blame.

``torch.cuda.set_sync_debug_mode`` warns of copies that wait, and of values that are read; it does
not see events, which vLLM's own runner waits for.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vllm_ssd

WARNING = "called a synchronizing CUDA operation"
_OURS = str(Path(vllm_ssd.__file__).parent)
_STEP = ("/vllm/v1/worker/", "/vllm/v1/sample/")
"""Where vLLM's step is. What both it and the plugin call is on the caller's account."""


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the warnings inside, by their place: ``"vllm_ssd/... function"`` for ours.

    Without CUDA there are none.
    """
    import torch

    places: Counter[str] = Counter()

    def note(message: Any, *others: Any, **named: Any) -> None:
        if WARNING in str(message):
            places[place_of(traceback.extract_stack())] += 1
        else:
            shown(message, *others, **named)

    on_cuda = torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=WARNING)
        shown, warnings.showwarning = warnings.showwarning, note
        if on_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if on_cuda:
                torch.cuda.set_sync_debug_mode("default")


def place_of(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frame that is the plugin's or of vLLM's step; else the innermost of all."""
    here = (__file__, warnings.__file__)
    frames = [frame for frame in reversed(stack) if frame.filename not in here]
    for frame in frames:
        if frame.filename.startswith(_OURS):
            return f"vllm_ssd{frame.filename.removeprefix(_OURS)} {frame.name}"
        for part in _STEP:
            if part in frame.filename:
                return f"vllm{frame.filename.rpartition('/vllm')[2]} {frame.name}"
    return f"{Path(frames[0].filename).name} {frames[0].name}"


def ours(places: Counter[str]) -> Counter[str]:
    """Those of the plugin."""
    return Counter({place: n for place, n in places.items() if place.startswith("vllm_ssd/")})
