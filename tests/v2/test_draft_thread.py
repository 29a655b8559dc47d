"""One thread has the draft: it takes what comes from both sides, and its errors stop nothing."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import pytest

from tests.v2.draft_end import DraftEnd, client_of
from vllm_ssd.core.stats import Stats
from vllm_ssd.target.client import DraftClient
from vllm_ssd.target.v2.draft_thread import DraftThread
from vllm_ssd.wire.messages import Report


class Running:
    """A thread whose draft is on its way up."""

    def __init__(self, strict: bool) -> None:
        self.stats = Stats()
        self.draft = DraftEnd()
        self.client: DraftClient = client_of(self.draft, self.stats, lambda: None)
        self.turns = 0
        self.thread = DraftThread(self.client, self.stats, strict, self.turn_done)

    def turn_done(self) -> None:
        self.turns += 1


@pytest.fixture(params=[False])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    gc.collect()  # the pipes of tests before: descriptors are counted
    running = Running(strict=request.param)
    yield running
    running.thread.close()
    running.draft.dies()


strict = pytest.mark.parametrize("running", [True], indirect=True, ids=["strict"])


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def fail() -> None:
    raise KeyError("a mistake")


def test_it_takes_what_the_draft_says_unasked(running: Running) -> None:
    until(lambda: running.client.up)
    running.draft.says(Report({"steps": 7.0}))
    until(lambda: running.client.reported.counters)
    assert running.client.reported.counters == {"steps": 7.0}


def test_it_does_what_is_posted_in_order_and_answers_after_that(running: Running) -> None:
    done: list[int] = []
    for number in range(50):
        running.thread.post(partial(done.append, number))
    assert running.thread.ask(lambda: (len(done), threading.current_thread().name)) == (
        50,
        "vllm-ssd-draft",
    )
    assert done == list(range(50))


def test_the_draft_is_heard_while_calls_pile_up(running: Running) -> None:
    until(lambda: running.client.up)
    before, slow = running.turns, partial(time.sleep, 0.003)
    for _ in range(20):
        running.thread.post(slow)
    running.draft.says(Report({"steps": 7.0}))
    heard: list[bool] = []
    running.thread.post(lambda: heard.append(bool(running.client.reported.counters)))
    running.thread.ask(lambda: None)
    assert heard == [True]
    assert running.turns - before >= 5


def test_who_asks_gets_the_error(running: Running) -> None:
    with pytest.raises(KeyError, match="a mistake"):
        running.thread.ask(fail)
    assert running.stats.errors == 0


def test_an_error_ends_the_epoch_and_nothing_else(running: Running) -> None:
    until(lambda: running.client.up)
    epoch = running.client.epoch
    running.thread.post(fail)
    assert running.thread.ask(lambda: running.client.epoch) == epoch + 1
    assert running.stats.errors == 1
    running.thread.check()


def test_an_error_of_another_thread_counts_like_one_of_its_own(running: Running) -> None:
    until(lambda: running.client.up)
    epoch = running.client.epoch
    running.thread.report(KeyError("a mistake"))
    assert running.thread.ask(lambda: running.client.epoch) == epoch + 1
    assert running.stats.errors == 1
    running.thread.check()


def test_an_idle_thread_looks_around(running: Running) -> None:
    until(lambda: running.client.up)
    before = running.turns
    until(lambda: running.turns >= before + 2)


def test_a_descriptor_that_was_closed_under_it_costs_the_draft_alone(running: Running) -> None:
    until(lambda: running.client.up)
    running.draft.channel.close()
    assert running.thread.ask(lambda: threading.current_thread().name) == "vllm-ssd-draft"
    until(lambda: not running.client.up)
    before = running.turns
    until(lambda: running.turns > before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_asks_a_thread_that_dies_is_told(running: Running) -> None:
    def end() -> None:
        raise SystemExit

    running.thread.post(end)
    with pytest.raises(RuntimeError, match="has ended"):
        running.thread.ask(lambda: None)
    until(lambda: running.client.link is None)
    running.thread.post(fail)  # too late


@strict
def test_a_reported_error_is_raised_at_once(running: Running) -> None:
    running.thread.report(KeyError("a mistake"))
    with pytest.raises(KeyError, match="a mistake"):
        running.thread.check()


@strict
def test_an_error_is_raised_where_errors_are_to_be_raised(running: Running) -> None:
    running.thread.post(fail)
    running.thread.ask(lambda: None)
    with pytest.raises(KeyError, match="a mistake"):
        running.thread.check()


def test_closing_ends_draft_thread_and_descriptors(running: Running) -> None:
    before = len(os.listdir("/proc/self/fd"))
    running.thread.close()
    running.thread.close()
    assert running.client.link is None
    assert len(os.listdir("/proc/self/fd")) == before - 1  # the channel
    running.thread.post(fail)  # too late
    with pytest.raises(RuntimeError, match="has ended"):
        running.thread.ask(lambda: None)


def test_its_pipe_is_freed_with_it(running: Running) -> None:
    before = len(os.listdir("/proc/self/fd"))
    running.thread.close()
    vars(running)["thread"] = SimpleNamespace(close=lambda: None)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before - 3  # the channel too


def test_a_call_after_the_end_writes_to_no_file_of_others(running: Running) -> None:
    running.thread.close()
    with tempfile.TemporaryFile() as other:  # gets the first number that is free
        running.thread._wake()
        running.thread.report(KeyError("late"))
        assert other.seek(0, os.SEEK_END) == 0
