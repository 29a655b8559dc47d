"""Cores left to the draft where vLLM has bound the target's worker processes itself."""

from __future__ import annotations

import logging
import os

import pytest

from vllm_ssd.target import cores
from vllm_ssd.target.cores import Cores, split_cores

ALL = sorted(os.sched_getaffinity(os.getppid()))
FIRST, LAST = ALL[0], ALL[-1]

needs_two_cores = pytest.mark.skipif(len(ALL) < 2, reason="needs two cores")


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Lets a test set how vLLM has bound the target; no two cores share a physical one."""
    for name in ("GOMP_CPU_AFFINITY", "OMP_PLACES", "KMP_AFFINITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "_siblings", lambda found: set(found))
    return monkeypatch


def bind_by_vllm(bound: pytest.MonkeyPatch, setting: str) -> None:
    from vllm import envs

    bound.setitem(vars(envs), "VLLM_CPU_OMP_THREADS_BIND", setting)


@needs_two_cores
@pytest.mark.parametrize("setting", ["{0}", "{0}-{0}", "{0}|{0}"])
def test_the_draft_gets_what_the_setting_leaves(bound: pytest.MonkeyPatch, setting: str) -> None:
    bind_by_vllm(bound, setting.format(FIRST))
    assert split_cores(None, in_process=False) == Cores(None, ALL[1:])


@needs_two_cores
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GOMP_CPU_AFFINITY", "{0}"),
        ("OMP_PLACES", "{{{0}}}"),
        ("KMP_AFFINITY", "granularity=fine,explicit,proclist=[{0}],verbose"),
    ],
)
def test_with_automatic_binding_the_openmp_settings_count(
    bound: pytest.MonkeyPatch, name: str, value: str
) -> None:
    bind_by_vllm(bound, "auto")
    bound.setenv(name, value.format(FIRST))
    assert split_cores(None, in_process=False) == Cores(None, ALL[1:])


@needs_two_cores
@pytest.mark.parametrize(("num_workers", "left"), [(1, ALL[1:]), (2, [])])
def test_with_automatic_binding_the_other_workers_have_the_other_nodes(
    bound: pytest.MonkeyPatch, num_workers: int, left: list[int]
) -> None:
    bind_by_vllm(bound, "auto")
    bound.setenv("GOMP_CPU_AFFINITY", str(FIRST))
    bound.setattr(cores, "_node", lambda core: f"node{core}")
    split = split_cores(None, in_process=False, num_workers=num_workers)
    assert split.draft == (left or [LAST])


def test_a_target_that_is_not_bound_takes_no_core(bound: pytest.MonkeyPatch) -> None:
    bind_by_vllm(bound, "nobind")
    assert split_cores(None, in_process=False) == Cores(None, ALL)


def test_if_the_target_has_all_cores_the_draft_shares_the_last_and_says_so(
    bound: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bind_by_vllm(bound, ",".join(map(str, ALL)))
    bound.setattr(cores.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, cores.logger.name):
        assert split_cores(None, in_process=False) == Cores(None, [LAST])
    assert "VLLM_CPU_OMP_THREADS_BIND" in caplog.text
    assert "draft_cpu_cores" in caplog.text


@needs_two_cores
def test_the_users_cores_are_taken_as_they_are(bound: pytest.MonkeyPatch) -> None:
    bind_by_vllm(bound, "nobind")
    assert split_cores([FIRST], in_process=False).draft == [FIRST]
    split = split_cores([FIRST], in_process=True)
    assert split == Cores(ALL[1:], [FIRST])


@needs_two_cores
def test_a_core_that_shares_a_physical_one_with_the_targets_is_not_free(
    bound: pytest.MonkeyPatch,
) -> None:
    bind_by_vllm(bound, str(FIRST))
    bound.setattr(cores, "_siblings", lambda found: {*found, *ALL[1:-1]})
    assert split_cores(None, in_process=False).draft == [LAST]
