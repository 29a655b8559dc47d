"""However an engine ends, nothing of it is left behind; and two engines do not interfere."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path

import pytest
from vllm import LLM

from tests.robustness import harness
from tests.robustness.conftest import MAX_TOKENS, TEXTS
from tests.robustness.harness import GONE_SECONDS, wait_for
from tests.robustness.scripts import START_SECONDS, Script, running_script
from tests.tiny_models import TinyModels


def test_shut_down_engine_leaves_nothing_even_with_a_stopped_draft(tiny_pair: TinyModels) -> None:
    cores = os.sched_getaffinity(0)
    files = harness.open_files(os.getpid())
    options = harness.ssd_options(tiny_pair.itself)
    with harness.running_engine(tiny_pair, options) as llm:
        draft = harness.draft_pid(llm)
        os.kill(draft, signal.SIGSTOP)
    wait_for(lambda: not harness.is_alive(draft), GONE_SECONDS, "the draft is gone")
    assert os.sched_getaffinity(0) == cores
    assert "vllm-ssd-draft" not in {thread.name for thread in threading.enumerate()}
    sockets = {name for name in harness.open_files(os.getpid()) - files if "socket" in name}
    assert not sockets


@pytest.mark.slow
def test_dropped_engine_leaves_no_draft(tiny_pair: TinyModels) -> None:
    llm: LLM | None = LLM(
        model=str(tiny_pair.target),
        speculative_config=harness.ssd_options(tiny_pair.draft),
        **harness.ENGINE,
    )
    assert llm is not None
    draft = harness.draft_pid(llm)
    llm = None
    gc.collect()
    wait_for(lambda: not harness.is_alive(draft), GONE_SECONDS, "the draft is gone")


@pytest.mark.slow
def test_two_engines_at_once_do_not_interfere_and_leave_nothing(
    tiny_pair: TinyModels, expected: list[list[int]], tmp_path: Path
) -> None:
    with (
        running_script(tiny_pair, tiny_pair.itself, TEXTS, MAX_TOKENS, tmp_path / "a") as one,
        running_script(tiny_pair, tiny_pair.draft, TEXTS, MAX_TOKENS, tmp_path / "b") as other,
    ):
        assert one.next_answers() == expected
        assert other.next_answers() == expected
        assert len(one.drafts()) == len(other.drafts()) == 1
        assert one.drafts() != other.drafts()

        one.signal(signal.SIGINT)
        one.wait(START_SECONDS)
        one.assert_nothing_left()

        assert len(other.drafts()) == 1
        other.forget_answers()
        assert other.next_answers() == expected
        other.signal(signal.SIGKILL)
        other.assert_nothing_left()


@pytest.mark.slow
def test_engine_killed_while_its_draft_starts_leaves_nothing(
    tiny_pair: TinyModels, tmp_path: Path
) -> None:
    with running_script(tiny_pair, tiny_pair.draft, TEXTS, MAX_TOKENS, tmp_path / "t") as script:
        wait_for(lambda: len(script.drafts()) == 1, START_SECONDS, "a draft that starts")
        (draft,) = script.drafts()
        wait_for(lambda: _is_loading(draft), START_SECONDS, "a draft that loads its model")
        script.signal(signal.SIGKILL)
        script.assert_nothing_left()


@pytest.mark.slow
def test_killed_engine_core_leaves_nothing_below_it(
    tiny_pair: TinyModels, expected: list[list[int]], tmp_path: Path
) -> None:
    with running_script(
        tiny_pair, tiny_pair.itself, TEXTS, MAX_TOKENS, tmp_path / "t", multiprocessing=True
    ) as script:
        assert script.next_answers() == expected
        (draft,) = script.drafts()
        worker = _named(script, "VLLM::Worker")
        os.kill(_named(script, "VLLM::EngineCore"), signal.SIGKILL)
        wait_for(lambda: not harness.is_alive(draft), GONE_SECONDS, "the draft is gone")
        # vLLM's worker takes a little longer by itself.
        wait_for(lambda: not harness.is_alive(worker), 5 * GONE_SECONDS, "the worker is gone")


@pytest.mark.slow
def test_engine_whose_caller_is_killed_leaves_nothing(
    tiny_pair: TinyModels, expected: list[list[int]], tmp_path: Path
) -> None:
    with running_script(
        tiny_pair, tiny_pair.itself, TEXTS, MAX_TOKENS, tmp_path / "t", multiprocessing=True
    ) as script:
        assert script.next_answers() == expected
        assert len(script.drafts()) == 1
        script.signal(signal.SIGKILL)
        script.assert_nothing_left(30.0)  # vLLM gives each of its processes some seconds


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True], ids=["process", "terminal"])
def test_interrupted_engine_with_processes_leaves_nothing(
    tiny_pair: TinyModels, expected: list[list[int]], tmp_path: Path, whole_group: bool
) -> None:
    with running_script(
        tiny_pair, tiny_pair.itself, TEXTS, MAX_TOKENS, tmp_path / "t", multiprocessing=True
    ) as script:
        assert script.next_answers() == expected
        # A terminal interrupts the engine's and the draft's processes too.
        (os.killpg if whole_group else os.kill)(script.pid, signal.SIGINT)
        script.wait(START_SECONDS)
        script.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("multiprocessing", [False, True], ids=["in-process", "processes"])
@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGUSR2, 0, id="normal"),
        pytest.param(signal.SIGUSR1, 1, id="exception"),
    ],
)
def test_ended_caller_leaves_nothing(
    tiny_pair: TinyModels,
    expected: list[list[int]],
    tmp_path: Path,
    number: int,
    status: int,
    multiprocessing: bool,
) -> None:
    with running_script(
        tiny_pair, tiny_pair.itself, TEXTS, MAX_TOKENS, tmp_path / "t", multiprocessing
    ) as script:
        assert script.next_answers() == expected
        assert len(script.drafts()) == 1
        script.signal(number)
        assert script.wait(START_SECONDS) == status
        script.assert_nothing_left()


def _named(script: Script, title: str) -> int:
    """The script's process with this title."""
    (found,) = [pid for pid in script.processes() if harness.command(pid).startswith(title)]
    return found


def _is_loading(draft: int) -> bool:
    """Whether the draft is bringing up its model, for which it has made a file in memory."""
    return any("memfd:vllm-ssd-draft" in name for name in harness.open_files(draft))
