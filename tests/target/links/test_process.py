"""A draft process that cannot be started."""

from __future__ import annotations

import subprocess
import threading
from typing import Any

import pytest

from vllm_ssd.target.links.process import DraftProcess


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (threading.Thread, "start", RuntimeError("can't start new thread")),
        (subprocess, "Popen", BlockingIOError("no more processes")),
        (subprocess, "Popen", TypeError("no interpreter")),
    ],
)
def test_whatever_keeps_it_from_starting_is_raised_as_an_oserror(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match=str(error)):
        DraftProcess([])
