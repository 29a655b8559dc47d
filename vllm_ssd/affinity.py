"""The CPU cores of this process, before and while the plugin binds it to some of them."""

from __future__ import annotations

import os

_before: list[int] = []
"""Cores of this process before it was bound; empty while it is not."""
_bindings = 0
"""Engines in this process that have bound it."""


def available_cores() -> list[int]:
    """The cores this process may use, those it leaves to a draft included."""
    return list(_before) or sorted(os.sched_getaffinity(0))


def bind(cores: list[int]) -> None:
    """Bind all threads of this process, and those it will start, to ``cores``."""
    global _bindings
    _before[:] = available_cores()
    _bindings += 1
    _set_affinity(cores)


def unbind() -> None:
    """Undo one :func:`bind`; with the last one the process gets its cores back."""
    global _bindings
    _bindings -= 1
    if _bindings == 0:
        _set_affinity(_before)
        _before.clear()


def _set_affinity(cores: list[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:
            continue  # it ended meanwhile
