"""The client of the draft process: how long a start may take, how soon the next one follows."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from vllm_ssd.core.stats import Stats
from vllm_ssd.target import client as client_module
from vllm_ssd.target import exchange, failures
from vllm_ssd.target.client import DraftClient
from vllm_ssd.wire import channel as channel_module
from vllm_ssd.wire.channel import Channel
from vllm_ssd.wire.messages import (
    PROTOCOL,
    Allocate,
    DraftBound,
    Finished,
    Join,
    Ready,
    Report,
    Setup,
    Start,
    TargetBound,
    ToDraft,
    ToTarget,
    Verified,
)

TIMEOUT = 100.0
SETUP = Setup({}, 3, 4, True, 512)
JOIN = Join(PROTOCOL, "", 512, 3, [1, 1, 1, 1], 0, 4)


class Draft:
    """A stand-in for a draft process, at the other end of a real socket pair."""

    started: list[Draft]
    failure = None

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.pid = 0
        self.exit_code: int | None = None
        self.channel: Channel[TargetBound] = Channel(ours, TargetBound)
        self._own: Channel[DraftBound] = Channel(theirs, DraftBound)
        self._number = 0
        self.started.append(self)

    def says(self, message: ToTarget) -> None:
        self._own.send(TargetBound(1, self._number, [message]))
        self._number += 1

    def hears(self) -> list[list[ToDraft]]:
        """The messages of each frame that has arrived."""
        frames = self._own.receive(1.0)
        return [frame.messages for frame in frames if frame is not None]

    def dies(self) -> None:
        self._own.close()

    def wait(self, timeout: float) -> None:
        """It is dead."""

    def end(self) -> None:
        self.channel.close()


class Clock:
    """The time, set by the test."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """A clock that stands still, and no real processes."""
    clock = Clock()
    Draft.started = []
    monkeypatch.setattr(client_module, "time", clock)
    monkeypatch.setattr(exchange, "time", clock)
    yield clock
    for draft in Draft.started:
        draft.dies()


@pytest.fixture
def client(clock: Clock) -> DraftClient:
    return DraftClient(Draft, JOIN, TIMEOUT, Stats(), lambda: None, SETUP)


def bring_up(client: DraftClient, clock: Clock, seconds: float = 1.0) -> Draft:
    """The newest draft comes up after some time."""
    draft = Draft.started[-1]
    clock.now += seconds
    draft.says(Ready(8, 8, 32))
    client.poll()
    assert client.up
    return draft


def lose(client: DraftClient, clock: Clock) -> float:
    """The draft dies; seconds until the next one is started."""
    started, died = len(Draft.started), clock.now
    Draft.started[-1].dies()
    client.poll()
    while len(Draft.started) == started:
        clock.now += 0.25
        client.maintain()
    return clock.now - died


def test_the_targets_loading_time_does_not_count_as_the_drafts(
    client: DraftClient, clock: Clock
) -> None:
    client.launch()
    clock.now += 10 * TIMEOUT
    client.allocate(1 << 20)
    Draft.started[-1].says(Ready(8, 8, 32))
    client.wait_until_up()
    assert client.up


def test_restarts_back_off_while_the_draft_is_lost_soon(client: DraftClient, clock: Clock) -> None:
    client.launch()
    client.allocate(1 << 20)
    waited = []
    for _ in range(9):
        # However long it takes to come up: it is lost right after.
        bring_up(client, clock, seconds=failures.STABLE_SECONDS + 5.0)
        waited.append(lose(client, clock))
    assert waited == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    bring_up(client, clock)
    clock.now += failures.STABLE_SECONDS + 1.0
    assert lose(client, clock) == 0.5


def test_a_draft_that_never_comes_up_again_is_tried_for_ever(
    client: DraftClient, clock: Clock
) -> None:
    client.launch()
    client.allocate(1 << 20)
    bring_up(client, clock)
    for _ in range(1100):
        waited = lose(client, clock)
    assert waited == failures.LONGEST_BACKOFF_SECONDS


def test_a_server_is_tried_every_second_and_the_log_tells_it_once_a_minute(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(client_module.logger, "propagate", False)
    client = DraftClient(Draft, JOIN, TIMEOUT, Stats(), lambda: None)
    client.launch()
    for _ in range(180):
        assert lose(client, clock) <= failures.LONGEST_REJOIN_SECONDS
    assert 2 <= len(caplog.records) <= 4
    assert "not reached: " in caplog.text
    bring_up(client, clock)
    caplog.clear()
    assert lose(client, clock) <= failures.LONGEST_REJOIN_SECONDS
    assert len(caplog.records) == 1


def test_the_drafts_counters_go_on_after_a_restart(client: DraftClient, clock: Clock) -> None:
    client.launch()
    client.allocate(1 << 20)
    for total in (5.0, 10.0, 15.0):
        draft = bring_up(client, clock)
        draft.says(Report({"draft_steps": 5.0}))
        client.poll()
        assert client.reported.counters == {"draft_steps": total}
        lose(client, clock)


def test_small_messages_go_before_texts_and_each_text_by_itself(
    client: DraftClient, clock: Clock
) -> None:
    client.launch()
    client.allocate(1 << 20)
    draft = bring_up(client, clock)
    draft.hears()
    texts = [Start(handle, bytes(40_000), 100, []) for handle in range(2)]
    small: list[ToDraft] = [Finished(bytes(4)), Verified(b"", b"", b"", b"", b"", 0)]
    client.send([texts[0], small[0], texts[1], small[1]])
    assert draft.hears() == [small, [texts[0]], [texts[1]]]


def test_a_draft_that_loads_beside_the_target_may_have_come_up_long_ago(
    client: DraftClient, clock: Clock
) -> None:
    client.launch()
    client.allocate(1 << 20)
    draft = Draft.started[-1]
    heard = [message for frame in draft.hears() for message in frame]
    assert [type(message) for message in heard] == [Setup, Allocate, Join]
    draft.says(Ready(8, 8, 32))
    clock.now += 10 * TIMEOUT  # the target takes so long
    client.wait_until_up()
    assert client.up


def test_a_draft_that_loads_beside_the_target_has_the_timeout_from_there(
    client: DraftClient, clock: Clock
) -> None:
    client.launch()
    client.allocate(1 << 20)
    clock.now += TIMEOUT + 1.0
    with pytest.raises(RuntimeError, match=r"longer than draft_startup_timeout_s = 100"):
        client.wait_until_up()


def test_a_draft_put_to_sleep_stays_down_until_it_is_woken(
    client: DraftClient, clock: Clock
) -> None:
    client.launch()
    client.allocate(1 << 20)
    bring_up(client, clock).says(Report({"draft_steps": 5.0}))
    client.poll()
    client.sleep()
    assert client.link is None
    clock.now += 1000.0
    client.maintain()
    client.poll()
    assert len(Draft.started) == 1
    client.wake_up()
    draft = Draft.started[-1]
    assert len(Draft.started) == 2
    assert not client.up  # and nothing has waited for it
    heard = [message for frame in draft.hears() for message in frame]
    assert [type(message) for message in heard] == [Setup, Allocate, Join]
    assert heard[1] == Allocate(1 << 20)
    draft = bring_up(client, clock)
    draft.says(Report({"draft_steps": 2.0}))
    client.poll()
    assert client.reported.counters == {"draft_steps": 7.0}
    assert lose(client, clock) == failures.FIRST_BACKOFF_SECONDS


def test_waking_a_draft_that_does_not_sleep_does_nothing(client: DraftClient, clock: Clock) -> None:
    client.launch()
    client.allocate(1 << 20)
    bring_up(client, clock)
    client.wake_up()
    assert len(Draft.started) == 1
    client.close()
    client.wake_up()
    assert len(Draft.started) == 1


def test_a_draft_that_reads_nothing_is_replaced_however_much_is_waiting(
    client: DraftClient, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.launch()
    client.allocate(1 << 20)
    bring_up(client, clock)
    monkeypatch.setattr(channel_module, "MAX_PENDING_BYTES", 1 << 20)
    for handle in range(5):  # the second or third no longer fits, nor what any new epoch says
        client.send([Start(handle, bytes(4 << 20), 8, [])])
        clock.now += 1.0
        client.maintain()
    clock.now += client_module.SILENCE_SECONDS
    client.maintain()
    assert not client.up
    assert client.link is None


def test_requests_that_could_not_be_announced_are_announced_again(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[float] = []
    forget = lambda: forgotten.append(clock.now)  # noqa: E731
    client = DraftClient(Draft, JOIN, TIMEOUT, Stats(), forget, SETUP)
    client.launch()
    client.allocate(1 << 20)
    bring_up(client, clock)
    monkeypatch.setattr(channel_module, "MAX_PENDING_BYTES", 1 << 20)
    for handle in range(3):
        client.send([Start(handle, bytes(4 << 20), 8, [])])
    clock.now += 0.1
    before = len(forgotten)
    client.send([Start(9, bytes(16), 8, [])])
    assert forgotten[before:] == [clock.now]
