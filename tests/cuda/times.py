"""What steps take, alone and beside each other; what plain vLLM, draft_model and SSD yield."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tests.cuda.engines import Found, Speed, ratio
from tests.cuda.runs import DEPTH, Placement, Runs
from tests.cuda.steps import Step
from tests.cuda.text import compare, difference
from tests.cuda.verdicts import FailedError, SkippedError

FEWEST = 10
"""Steps that a median takes."""


def check_steps(runs: Runs, placement: Placement) -> list[str]:
    """A step of the target and one of the draft, alone and beside each other: figures only."""
    watched, draft = runs.watched(placement).watched, runs.draft_alone(placement)
    assert watched is not None
    verifies = watched.depth + 1
    alone, beside = _seconds(watched.alone, verifies), _seconds(watched.beside, verifies)
    if min(len(alone), len(beside)) < FEWEST:
        raise FailedError(f"too few steps of {verifies} tokens: {len(alone)} and {len(beside)}")
    target = [statistics.median(each) for each in (alone, beside)]
    rows = ratio(watched.counters, "draft_rows", "draft_steps")
    model = watched.counters["draft_step_seconds"] - watched.counters["draft_python_seconds"]
    drafted = model / watched.counters["draft_steps"]
    same = draft.by_rows[min(draft.by_rows, key=lambda each: abs(each - rows))].seconds
    by_rows = ", ".join(f"{n}: {_ms(each.seconds)}" for n, each in draft.by_rows.items())
    return [
        f"target, {verifies} tokens: {_ms(target[0])} alone, {_ms(target[1])} beside the draft "
        f"({target[1] / target[0]:.2f} times; {len(alone)} and {len(beside)} steps)",
        f"draft, {rows:.1f} rows: {_ms(same)} alone, {_ms(drafted)} beside the target "
        f"({drafted / same:.2f} times)",
        f"draft alone by rows: {by_rows}",
    ]


def check_speed(runs: Runs, placement: Placement) -> list[str]:
    """Tokens per second of plain vLLM, draft_model and SSD: figures only."""
    plain, rival, ssd = runs.plain(), runs.draft_model(), runs.ssd(placement)
    named = {"plain": plain, "draft_model": rival, "SSD": ssd}
    figures = [
        f"{_said(name, found)}: " + ", ".join(_speed(*item) for item in found.speeds.items())
        for name, found in named.items()
    ]
    where = difference(plain.answers, ssd.answers)
    return [*figures, f"K = {DEPTH}, text of plain and SSD in {ssd.dtype}: {where or 'identical'}"]


def check_runners(runs: Runs) -> list[str]:
    """Plain vLLM on V1 and on V2: figures only."""
    if runs.machine.lacks_v2:
        raise SkippedError(runs.machine.lacks_v2)
    found = [runs.plain("0"), runs.plain("1")]
    return [
        f"{_said('plain', each)}: " + ", ".join(_speed(*item) for item in each.speeds.items())
        for each in found
    ]


def check_ssd_on_v2(runs: Runs, placement: Placement) -> list[str]:
    """SSD on V2 answers what plain vLLM does; its speed beside that on V1."""
    if runs.machine.lacks_v2:
        raise SkippedError(runs.machine.lacks_v2)
    exact = runs.ssd_exact_on_v2()
    graphs = f"{exact.look_up_graphs} graphs of the look-up"
    figures = compare(runs.plain_exact(), exact, [exact.runner, exact.dtype, graphs])
    if not exact.counters["tokens_accepted"]:
        raise FailedError("no drafted token was accepted", figures)
    if runs.machine.has_cuda and not exact.look_up_graphs:
        raise FailedError("no CUDA graph of the look-up was captured", figures)
    if not runs.effort.sizes:
        return figures
    for found in (runs.ssd(placement, "0"), runs.ssd(placement, "1")):
        speeds = ", ".join(_speed(*item) for item in found.speeds.items())
        figures.append(f"{_said('SSD', found)}: {speeds}")
    return figures


def _seconds(steps: Sequence[Step], tokens: int) -> list[float]:
    """Of the steps of so many query tokens."""
    return [step.seconds for step in steps if step.tokens == tokens]


def _said(name: str, found: Found) -> str:
    scheduled = ", asynchronous" if found.async_scheduling else ""
    return f"{name} ({found.runner}, {found.dtype}{scheduled})"


def _speed(size: int, speed: Speed) -> str:
    said = f"{speed.tokens_per_second:.0f} tokens/s at batch {size} ({speed.ms_per_token:.2f} ms"
    if speed.accepted_length == speed.accepted_length:
        said += f", acceptance length {speed.accepted_length:.2f}"
    if speed.hit_rate == speed.hit_rate:
        said += f", {speed.hit_rate:.0%} hits"
    if speed.off_rate == speed.off_rate:
        said += f", {speed.off_rate:.0%} of rounds without speculation"
    return said + ")"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
