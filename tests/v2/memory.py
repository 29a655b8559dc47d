"""The memory of a writer, store by store: what a device may see of it at any moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from vllm_ssd.target.v2.device_trees import DeviceTrees

ARRAYS = ("roots", "forks", "tokens", "length", "ended")


class _Watched(np.ndarray[Any, Any]):
    """An array that notes the stores into its memory, number by number."""

    _memory: Memory
    _name: str

    def __array_finalize__(self, source: Any) -> None:
        self._memory = getattr(source, "_memory", None)  # type: ignore[assignment]
        self._name = getattr(source, "_name", "")

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self._memory.note(self._name, self, key)


class Memory:
    """Watches the arrays of a :class:`DeviceTrees` from now on."""

    def __init__(self, trees: DeviceTrees) -> None:
        self._trees = trees
        self._images: list[dict[str, torch.Tensor]] = []
        self._host = {name: getattr(trees, f"host_{name}") for name in ARRAYS}
        self.begin()
        for name, array in self._host.items():
            watched = array.view(_Watched)
            watched._memory, watched._name = self, name
            setattr(trees, f"host_{name}", watched)

    def begin(self) -> None:
        """Forget the stores so far."""
        self._images = [{n: torch.from_numpy(a.copy()) for n, a in self._host.items()}]

    def note(self, name: str, array: np.ndarray[Any, Any], key: Any) -> None:
        """A store into an array, or into a copy of a part of one."""
        host = self._host[name]
        if not np.shares_memory(array, host):
            return
        # Views are leading rows, so what is counted in a view counts in the whole.
        for at in np.arange(array.size).reshape(array.shape)[key].ravel().tolist():
            before = self._images[-1][name]
            stored = host.ravel()[at].item()
            if before.view(-1)[at].item() != stored:
                after = before.clone()
                after.view(-1)[at] = stored
                self._images.append({**self._images[-1], name: after})

    def __len__(self) -> int:
        """How many states the memory has been in."""
        return len(self._images)

    def states(self) -> Iterator[Seen]:
        """What is seen by someone who reads all at once, at each moment."""
        return (Seen(self._trees, [image]) for image in self._images)

    def seen(self, moments: Sequence[int]) -> Seen:
        """What is seen by someone who reads one array after the other, each at its moment."""
        return Seen(self._trees, [self._images[moment] for moment in moments])


class Seen:
    """Stands for a :class:`DeviceTrees`: each read sees the memory as it is by then."""

    def __init__(self, trees: DeviceTrees, images: Sequence[dict[str, torch.Tensor]]) -> None:
        self.depth, self.width = trees.depth, trees.width
        self.vocab_size, self.counting = trees.vocab_size, trees.counting
        self.sources = trees.sources
        self._images = list(images)

    def __getattr__(self, name: str) -> torch.Tensor:
        image = self._images.pop(0) if len(self._images) > 1 else self._images[0]
        return image[name]
