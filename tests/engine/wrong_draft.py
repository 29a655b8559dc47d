"""A draft process with a mistake, started in place of the real one.

``python wrong_draft.py <mistake> -m vllm_ssd.draft <arguments>``
"""

from __future__ import annotations

import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@contextmanager
def drafts_with(mistake: str, folder: Path) -> Iterator[None]:
    """Draft processes that start meanwhile make a mistake."""
    from vllm_ssd.target.links import process

    launcher = folder / "draft"
    command = shlex.join([sys.executable, __file__, mistake])
    launcher.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    launcher.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "sys", SimpleNamespace(executable=str(launcher)))
        yield


def make(mistake: str) -> None:
    """Replace what the draft samples with."""
    from vllm_ssd.draft import sampling as module

    sampling: Any = module
    requested, proposals, draw = module.requested, module.proposals, module.draw
    at_its_temperature: list[Any] = []
    drawn_from: list[Any] = []

    def with_end_tokens(q: Any, tokens: Any, of: Any) -> Any:
        return proposals(q, tokens, of._replace(ends=0 * of.ends - 1))

    def without_weights(q: Any, tokens: Any, of: Any) -> Any:
        drawn_from[:] = [proposals(q, tokens, of)]
        return proposals(q, tokens, of._replace(weight=0.0 * of.weight + 1.0))

    def requested_at_temperature_1(values: Any, of: Any) -> Any:
        at_its_temperature[:] = [requested(values, of)]
        return requested(values, of._replace(temperature=0.0 * of.temperature + 1.0))

    def at_temperature_1(q: Any, tokens: Any, of: Any) -> Any:
        drawn_from[:] = [proposals(at_its_temperature.pop()[:, : q.shape[1]], tokens, of)]
        return proposals(q, tokens, of)

    def draw_from_another(q: Any, tokens: Any, uniform: Any) -> Any:
        # But no token that it says to be impossible: the target would refuse that.
        return draw(drawn_from.pop() * (q > 0.0), tokens, uniform)

    if mistake == "end tokens":
        sampling.proposals = with_end_tokens
        return
    if mistake == "temperature":
        sampling.requested = requested_at_temperature_1
    sampling.proposals = {"C": without_weights, "temperature": at_temperature_1}[mistake]
    sampling.draw = draw_from_another


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    make(sys.argv[1])
    del sys.argv[:3]
    runpy.run_module("vllm_ssd.draft", run_name="__main__", alter_sys=True)
