"""What only a CUDA device can show: graphs, waits for it, its memory."""

from __future__ import annotations

from collections import Counter

from tests.cuda.engines import Found, Watched, ratio
from tests.cuda.marks import Planned
from tests.cuda.runs import Placement, Runs
from tests.cuda.syncs import ours
from tests.cuda.verdicts import FailedError, SkippedError

NO_DEVICE = "no CUDA device"
MOSTLY = 0.9
"""Of the draft's steps, so many must replay a graph; the others compute prompt tokens as well."""
MIB = 1 << 20
SLACK = 128 * MIB
"""What torch and CUDA may round up."""


def check_graphs(runs: Runs, placement: Placement) -> list[str]:
    """Graphs are there for the draft's rows, and used; the target's are used too."""
    found, draft = runs.watched(placement), runs.draft_alone(placement)
    watched = _watched(found)
    steps = watched.counters["draft_steps"]
    replayed = ratio(watched.counters, "draft_graph_steps", "draft_steps")
    modes = Counter(step.graph or "none" for step in watched.beside)
    figures = [
        f"draft: {draft.graphs}, {draft.captured} captured, for "
        f"{_listed(draft.full_sizes)} rows with the attention",
        f"{replayed:.0%} of the draft's {steps:.0f} steps replayed one",
        f"target: {found.graphs}; steps: {_counted(modes)}",
    ]
    if not runs.machine.has_cuda:
        raise SkippedError(NO_DEVICE, figures)
    without = [n for n, rows in draft.by_rows.items() if rows.graph_steps < draft.steps]
    if without:
        raise FailedError(f"no graph replayed at {_listed(without)} rows", figures)
    if draft.captured_later:
        raise FailedError(f"{draft.captured_later} graphs captured while it decoded", figures)
    if replayed < MOSTLY:
        raise FailedError("too many of the draft's steps ran without a graph", figures)
    return figures


def check_syncs(runs: Runs, placement: Placement) -> list[str]:
    """The host waits for the device nowhere in our hooks, and nowhere in the draft's launches."""
    watched, draft = runs.watched(placement), runs.draft_alone(placement)
    launches = f"launches of the draft: {draft.syncs.total()}"
    figures = _check_waits(runs, watched, [launches])
    if draft.syncs:
        raise FailedError(f"in launches of the draft: {_counted(draft.syncs)}", figures)
    return figures


def check_syncs_on_v2(runs: Runs) -> list[str]:
    """The same of the hooks on V2, where nothing may wait in vLLM's loop either."""
    if runs.machine.lacks_v2:
        raise SkippedError(runs.machine.lacks_v2)
    return _check_waits(runs, runs.ssd_exact_on_v2(), [])


def _check_waits(runs: Runs, found: Found, more: list[str]) -> list[str]:
    waited = found.waited
    assert waited is not None
    in_hooks = ours(waited.places)
    vllm = waited.places - in_hooks
    figures = [
        f"{waited.steps} steps: ours {in_hooks.total()}, vLLM's {vllm.total()} ({_counted(vllm)})",
        *more,
    ]
    if not runs.machine.has_cuda:
        raise SkippedError(NO_DEVICE, figures)
    if in_hooks:
        raise FailedError(f"in our hooks: {_counted(in_hooks)}", figures)
    return figures


def check_memory(runs: Runs, placement: Placement) -> list[str]:
    """Target and draft take no more than planned."""
    marks = runs.watched(placement).marks
    plan = marks.planned
    assert plan is not None
    drafted, planned = marks.both - marks.target, plan.kv_bytes + plan.overhead_bytes
    figures = [
        _plan(plan, runs.watched(placement).kv_tokens),
        f"beside the target it takes {drafted // MIB} MiB",
        f"both {(marks.both - marks.start) // MIB} MiB, after the work "
        f"{(marks.worked - marks.start) // MIB} MiB",
    ]
    if not runs.machine.has_cuda:
        raise SkippedError(NO_DEVICE, figures)
    figures.append(f"asked for: {marks.asked // MIB} MiB")
    if drafted > SLACK + (planned if plan.shares_device else 0):
        raise FailedError("the draft takes more of the target's device than planned", figures)
    if marks.worked - marks.start > marks.asked + SLACK and plan.shares_device:
        raise FailedError("both together take more than was asked for", figures)
    return figures


def _plan(plan: Planned, target_tokens: int) -> str:
    if not plan.shares_device and not plan.kv_bytes:
        return f"planned: what vLLM finds on the draft's device; {plan.overhead_bytes // MIB} MiB"
    tokens = plan.kv_bytes // plan.kv_bytes_per_token
    return (
        f"planned for the draft: {plan.kv_bytes // MIB} MiB of KV cache ({tokens} tokens, the "
        f"target's has {target_tokens}) and {plan.overhead_bytes // MIB} MiB besides"
    )


def _watched(found: Found) -> Watched:
    assert found.watched is not None
    return found.watched


def _counted(places: Counter[str]) -> str:
    return ", ".join(f"{place} {count}" for place, count in places.most_common()) or "none"


def _listed(sizes: list[int]) -> str:
    if len(sizes) > 4:
        return f"{sizes[0]}, {sizes[1]}, ... {sizes[-1]} ({len(sizes)} sizes)"
    return ", ".join(map(str, sizes)) or "no"
