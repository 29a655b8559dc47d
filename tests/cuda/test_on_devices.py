"""What the report says on machines with CUDA devices, of results that were made up here."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.cuda import device, report
from tests.cuda.draft_alone import DraftFound, Rows
from tests.cuda.engines import Found, Waited, Watched, Work
from tests.cuda.machine import Device, Machine
from tests.cuda.marks import Marks, Planned
from tests.cuda.report import carry_out, checks
from tests.cuda.runs import Effort, Models, Placement, Runs
from tests.cuda.steps import Step
from tests.cuda.times import check_steps
from tests.cuda.verdicts import FailedError, Outcome, SkippedError

MIB = 1 << 20
HOPPER = Device("H", (9, 0), 80 << 30)
TURING = Device("T", (7, 5), 16 << 30)
EFFORT = Effort(sizes=(1,), rounds=1, draft_steps=20, seconds=60.0)
PLAN = Planned(
    shares_device=True,
    kv_bytes=1000 * MIB,
    kv_bytes_per_token=1 << 10,
    overhead_bytes=600 * MIB,
    taken_from_target=1600 * MIB,
    device="0",
    rows=64,
    setup=None,
)
MARKS = Marks(
    asked=4000 * MIB,
    start=100 * MIB,
    target=2000 * MIB,
    both=3500 * MIB,
    worked=3600 * MIB,
    planned=PLAN,
)
COUNTERS = {
    "draft_steps": 100.0,
    "draft_graph_steps": 97.0,
    "draft_rows": 600.0,
    "draft_step_seconds": 0.3,
    "draft_python_seconds": 0.1,
}
WATCHED = Watched(
    alone=[Step(5, 0.002, "FULL")] * 20,
    beside=[Step(5, 0.003, "FULL")] * 20 + [Step(1, 0.001, "PIECEWISE")],
    depth=4,
    counters=COUNTERS,
)
WAITED = Waited(Counter({"vllm/v1/worker/gpu_model_runner.py _to_list": 40}), 40)
FOUND = Found(
    start_seconds=30.0,
    runner="V1",
    dtype="bfloat16",
    attention="FLASH_ATTN",
    graphs="FULL_AND_PIECEWISE",
    look_up_graphs=8,
    async_scheduling=False,
    kv_tokens=1 << 20,
    answers=[],
    counters={},
    speeds={},
    watched=WATCHED,
    waited=WAITED,
    marks=MARKS,
)
DRAFT = DraftFound(
    graphs="FULL_AND_PIECEWISE",
    captured=90,
    captured_later=0,
    full_sizes=[1, 2, 4, 8, 64],
    steps=20,
    by_rows={rows: Rows(0.001, 20) for rows in (1, 6, 64)},
    syncs=Counter(),
)


def machine(*devices: Device) -> Machine:
    return Machine(list(devices), {}, lacks_v2="")


class Prepared(Runs):
    """Engines that have found this already.

    Args:
        found: of the engine whose steps are watched.
        draft: of the draft alone.
    """

    def __init__(self, found: Found, draft: DraftFound = DRAFT) -> None:
        super().__init__(machine(HOPPER), Models("t", "d", None), EFFORT, lambda line: None)
        self._found, self._draft = found, draft

    def watched(self, placement: Placement) -> Found:
        return self._found

    def draft_alone(self, placement: Placement) -> DraftFound:
        return self._draft

    def ssd_exact_on_v2(self) -> Found:
        return self._found


class Asked(Runs):
    """Notes what is to be started, and starts nothing."""

    def __init__(self, *devices: Device) -> None:
        super().__init__(machine(*devices), Models("t", "d", None), EFFORT, lambda line: None)
        self.works: dict[str, Work] = {}

    def _once(self, name: str, call: Callable[..., Any], spec: Any) -> Any:
        self.works[name] = spec
        raise SkippedError("not started")


SHARED = Placement("shared", {})
CHECKS = (device.check_graphs, device.check_syncs, device.check_memory, check_steps)


@pytest.mark.parametrize("check", CHECKS)
def test_a_device_where_all_is_well_passes(check: Callable[..., list[str]]) -> None:
    assert check(Prepared(FOUND), SHARED)


def test_waits_of_the_hooks_on_v2_fail_as_well() -> None:
    assert device.check_syncs_on_v2(Prepared(FOUND))
    with pytest.raises(FailedError, match="in our hooks: vllm_ssd/target/v1/handover"):
        device.check_syncs_on_v2(Prepared(FOUND._replace(waited=Waited(OURS, 40))))


def watched(**changes: Any) -> Found:
    return FOUND._replace(watched=WATCHED._replace(**changes))


def marks(**changes: Any) -> Found:
    return FOUND._replace(marks=dataclasses.replace(MARKS, **changes))


OURS = Counter({"vllm_ssd/target/v1/handover.py give": 3})
PLACED = PLAN._replace(shares_device=False, kv_bytes=0)


@pytest.mark.parametrize(
    ("check", "found", "draft", "why"),
    [
        (
            device.check_graphs,
            FOUND,
            DRAFT._replace(by_rows={1: Rows(0.001, 20), 64: Rows(0.004, 0)}),
            "no graph replayed at 64 rows",
        ),
        (device.check_graphs, FOUND, DRAFT._replace(captured_later=2), "2 graphs captured"),
        (
            device.check_graphs,
            watched(counters={**COUNTERS, "draft_graph_steps": 50.0}),
            DRAFT,
            "without a graph",
        ),
        (
            device.check_syncs,
            FOUND._replace(waited=Waited(OURS, 40)),
            DRAFT,
            "in our hooks: vllm_ssd/target/v1/handover",
        ),
        (device.check_syncs, FOUND, DRAFT._replace(syncs=OURS), "in launches of the draft"),
        (device.check_memory, marks(both=3800 * MIB), DRAFT, "than planned"),
        (device.check_memory, marks(worked=4300 * MIB), DRAFT, "than was asked for"),
        (device.check_memory, marks(planned=PLACED), DRAFT, "more of the target's device"),
        (check_steps, watched(alone=WATCHED.alone[:3]), DRAFT, "too few steps of 5 tokens: 3"),
    ],
)
def test_what_is_wrong_fails(
    check: Callable[..., list[str]], found: Found, draft: DraftFound, why: str
) -> None:
    with pytest.raises(FailedError) as failed:
        check(Prepared(found, draft), SHARED)
    assert why in failed.value.reason


def test_a_draft_on_its_own_device_is_checked_on_both() -> None:
    runs = Asked(HOPPER, HOPPER)
    titles = [check.title for check in checks(runs)]
    for subject in (
        "CUDA graphs",
        "no synchronisation",
        "memory as planned",
        "step times",
        "speed",
    ):
        assert f"{subject}, draft on its own device" in titles
        assert f"{subject}, draft on the target's device" in titles
    verdicts = [carry_out(check) for check in checks(runs)]
    assert {verdict.outcome for verdict in verdicts} == {Outcome.SKIPPED}
    text = report.report(runs.machine, runs.models, verdicts, 60.0)
    assert f"0 passed, 0 failed, {len(verdicts)} skipped, in 1 min" in text
    options = runs.works["SSD, draft on the target's device, watched"].speculative_config
    assert options is not None
    assert options["draft_device"] == "cuda:0"


def test_identity_is_asked_of_batch_invariant_engines_where_vllm_has_them() -> None:
    for device_, invariant in ((HOPPER, "1"), (TURING, None)):
        runs = Asked(device_)
        for engine in (runs.plain_exact, runs.ssd_exact):
            with pytest.raises(SkippedError):
                engine()
        for work in runs.works.values():
            assert work.dtype == "float32"
            assert work.environment.get("VLLM_BATCH_INVARIANT") == invariant


def test_no_engine_is_started_once_the_time_is_over() -> None:
    effort = EFFORT._replace(seconds=0.0)
    runs = Runs(machine(HOPPER), Models("t", "d", None), effort, lambda line: None)
    with pytest.raises(SkippedError, match="the time is over"):
        runs.plain()
