"""The channel over a real socket pair."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.wire import channel as channel_module
from vllm_ssd.wire.channel import (
    MAX_FRAME_BYTES,
    MAX_PENDING_BYTES,
    Channel,
    ChannelClosedError,
    ChannelFullError,
)
from vllm_ssd.wire.messages import DraftBound, Finished, Start, Stepped, TargetBound, ToDraft

MEGABYTE = 1 << 20


class Pair:
    """A target's channel, and the draft's end as a channel or as a bare socket."""

    def __init__(self) -> None:
        ours, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.target: Channel[TargetBound] = Channel(ours, TargetBound)
        self._draft: Channel[DraftBound] | None = None

    @property
    def draft(self) -> Channel[DraftBound]:
        if self._draft is None:
            self._draft = Channel(self.socket, DraftBound)
        return self._draft

    def draft_buffer(self) -> int:
        """How many bytes the draft's socket may hold."""
        self.draft.fileno()
        return self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    def close(self) -> None:
        self.target.close()
        self.socket.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    both = Pair()
    yield both
    both.close()


def frame(number: int, size: int = 0) -> DraftBound:
    messages: list[ToDraft] = [Finished(b"\x00" * size)]
    return DraftBound(0, number, messages)


def encoded(a_frame: msgspec.Struct) -> bytes:
    payload = msgspec.msgpack.encode(a_frame)
    return struct.pack("<I", len(payload)) + payload


def receive_all(receiver: Channel[DraftBound], sender: Channel[TargetBound]) -> list[DraftBound]:
    """Read until the sender has nothing left to send."""
    frames: list[DraftBound | None] = []
    done = False
    while not done:
        done = sender.flush()
        frames += receiver.receive()
    assert None not in frames
    return [a_frame for a_frame in frames if a_frame is not None]


def test_frames_arrive_in_order(pair: Pair) -> None:
    sent = [frame(number, size=number) for number in range(100)]
    for a_frame in sent:
        pair.target.send(a_frame)
    assert receive_all(pair.draft, pair.target) == sent


def test_nothing_to_read_is_no_frame_and_no_wait(pair: Pair) -> None:
    assert pair.draft.receive() == []


def test_waiting_ends_with_the_timeout(pair: Pair) -> None:
    assert pair.draft.receive(timeout=0.01) == []


def test_waiting_ends_with_the_first_frame(pair: Pair) -> None:
    thread = threading.Timer(0.05, pair.target.send, [frame(3)])
    thread.start()
    assert pair.draft.receive(timeout=None) == [frame(3)]
    thread.join()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.data())
def test_frames_cut_anywhere_arrive_whole(sizes: list[int], data: st.DataObject) -> None:
    pair = Pair()
    try:
        sent = [frame(number, size) for number, size in enumerate(sizes)]
        stream = b"".join(encoded(a_frame) for a_frame in sent)
        cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
        arrived: list[DraftBound | None] = []
        receiver: Channel[DraftBound] = Channel(pair.socket, DraftBound)
        ours = socket.socket(fileno=socket.dup(pair.target.fileno()))
        with ours:
            for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                ours.sendall(stream[start:end])
                arrived += receiver.receive()
        assert arrived == sent
    finally:
        pair.close()


def test_a_frame_larger_than_the_socket_is_sent_in_parts(pair: Pair) -> None:
    tokens = bytes(range(256)) * (20 * MEGABYTE // 256)
    big = DraftBound(1, 2, [Start(3, tokens, 4, [5])])
    pair.target.send(big)
    assert not pair.target.flush()  # nothing has been read yet
    pair.target.send(frame(3))
    assert receive_all(pair.draft, pair.target) == [big, frame(3)]


def test_what_the_socket_leaves_is_sent_while_the_sender_does_other_things(pair: Pair) -> None:
    text = frame(0, size=8 * MEGABYTE)
    pair.target.send(text, frame(1))
    got: list[DraftBound | None] = []
    deadline = time.monotonic() + 10.0
    while len(got) < 2 and time.monotonic() < deadline:
        got += pair.draft.receive(timeout=1.0)  # the target's end is not called
    assert got == [text, frame(1)]


def test_sending_does_not_wait_for_a_reader_that_does_not_read(pair: Pair) -> None:
    pair.target.send(frame(0, size=8 * MEGABYTE))
    began = time.monotonic()
    for number in range(1, 200):
        pair.target.send(frame(number, size=100))
        pair.target.receive()
    assert time.monotonic() - began < 1.0
    assert not pair.target.flush()


def test_a_frame_behind_a_long_one_is_left_to_the_thread(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = frame(0, size=8 * MEGABYTE)
    pair.target.send(text)
    senders: list[threading.Thread] = []
    send_some = Channel._send_some

    def watched(channel: Channel[TargetBound]) -> None:
        senders.append(threading.current_thread())
        send_some(channel)

    monkeypatch.setattr(Channel, "_send_some", watched)
    pair.target.send(frame(1))
    assert threading.current_thread() not in senders
    got: list[DraftBound | None] = []
    while len(got) < 2:
        got += pair.draft.receive(timeout=10.0)
    assert got == [text, frame(1)]
    assert senders


@pytest.mark.parametrize("reader", ["does not read", "is gone"])
def test_the_thread_that_sends_ends_with_the_channel(reader: str) -> None:
    before = threading.active_count()
    pair = Pair()
    pair.target.send(frame(0, size=8 * MEGABYTE))
    assert threading.active_count() == before + 1
    if reader == "is gone":
        pair.socket.close()
    began = time.monotonic()
    pair.target.close()
    assert time.monotonic() - began < 1.0
    assert threading.active_count() == before
    pair.close()


def test_a_channel_whose_reader_keeps_up_needs_no_thread(pair: Pair) -> None:
    before = threading.active_count()
    for number in range(1000):
        pair.target.send(frame(number, size=1000))
        assert pair.draft.receive(1.0) == [frame(number, size=1000)]
    assert threading.active_count() == before


def test_a_process_forked_while_something_is_left_over_disturbs_nothing(pair: Pair) -> None:
    text = frame(0, size=4 * MEGABYTE)
    pair.target.send(text)
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    got: list[DraftBound | None] = []
    while not got:
        got += pair.draft.receive(timeout=5.0)
    assert got == [text]


def test_waiting_for_frames_sends_what_is_left_over(pair: Pair) -> None:
    pair.target.send(frame(0, size=4 * MEGABYTE))
    got: list[DraftBound | None] = []

    def read_then_answer() -> None:
        while not got:
            got.extend(pair.draft.receive(timeout=5.0))
        pair.draft.send(TargetBound(0, 7, []))

    thread = threading.Thread(target=read_then_answer)
    thread.start()
    answer: list[TargetBound | None] = []
    deadline = time.monotonic() + 10.0
    while not answer and time.monotonic() < deadline:
        answer = pair.target.receive(timeout=1.0)
    thread.join()
    assert answer == [TargetBound(0, 7, [])]
    assert got == [frame(0, size=4 * MEGABYTE)]


def test_looking_for_frames_sends_what_is_left_over(pair: Pair) -> None:
    pair.target.send(frame(0, size=MEGABYTE))
    got: list[DraftBound | None] = []
    deadline = time.monotonic() + 10.0
    while not got and time.monotonic() < deadline:
        assert pair.target.receive() == []
        got = pair.draft.receive()
    assert got == [frame(0, size=MEGABYTE)]


def test_a_frame_that_the_other_end_would_not_take_is_not_sent() -> None:
    ours, theirs = socket.socketpair()
    sender: Channel[TargetBound] = Channel(ours, TargetBound, max_frame_bytes=1000)
    receiver: Channel[DraftBound] = Channel(theirs, DraftBound, max_frame_bytes=1000)
    with pytest.raises(ValueError, match="at most 1000"):
        sender.send(frame(0, size=2000))
    sender.send(frame(1, size=10))
    received = receiver.receive(5.0)
    assert [a_frame and a_frame.number for a_frame in received] == [1]
    sender.close()
    receiver.close()


def test_one_thread_may_send_while_another_receives(pair: Pair) -> None:
    sent = 150
    size = MEGABYTE // 4
    assert sent * size < MAX_PENDING_BYTES  # it fits even if the reader has not begun
    got: list[DraftBound | None] = []

    def read() -> None:
        while len(got) < sent:
            got.extend(pair.draft.receive(timeout=5.0))

    def receive_answers() -> None:
        while len(got) < sent:
            pair.target.receive()  # also sends what is left over

    threads = [threading.Thread(target=read), threading.Thread(target=receive_answers)]
    for thread in threads:
        thread.start()
    for number in range(sent):
        pair.target.send(frame(number, size=size))
    for thread in threads:
        thread.join(20.0)
    assert [a_frame and a_frame.number for a_frame in got] == list(range(sent))


def test_garbage_gives_none_and_the_next_frame_is_read(pair: Pair) -> None:
    garbage = b"\xc1 is no msgpack"
    wrong_type = encoded(DraftBound(0, 0, []))
    pair.socket.sendall(struct.pack("<I", len(garbage)) + garbage)
    pair.socket.sendall(struct.pack("<I", 0))
    pair.socket.sendall(wrong_type[:-1] + b"\x07")  # a number where the messages belong
    pair.socket.sendall(encoded(TargetBound(0, 1, [])))
    assert pair.target.receive() == [None, None, None, TargetBound(0, 1, [])]


@pytest.mark.parametrize(
    "argument", [b"\x91" * 100_000, b"\xa2\xff\xfe", b"\xdd\xff\xff\xff\xff", b"\x81\x80\x00"]
)
def test_what_msgpack_can_say_and_nothing_can_hold_is_garbage(pair: Pair, argument: bytes) -> None:
    # Nested too deep, not UTF-8, longer than the frame, a key that cannot be one.
    setup = b"\x93\x00\x00\x91\x9e\xa5Setup\x81\xa1a" + argument
    ours = pair.target
    with socket.socket(fileno=socket.dup(ours.fileno())) as raw:
        raw.sendall(struct.pack("<I", len(setup)) + setup + encoded(frame(1)))
    assert pair.draft.receive(5.0) == [None, frame(1)]


def test_an_announced_frame_takes_no_memory_before_it_arrives(pair: Pair) -> None:
    pair.socket.sendall(struct.pack("<I", MAX_FRAME_BYTES) + b"\x93")
    tracemalloc.start()
    try:
        assert pair.target.receive() == []
        assert tracemalloc.get_traced_memory()[1] < MEGABYTE
    finally:
        tracemalloc.stop()


def test_an_impossible_length_closes_the_channel(pair: Pair) -> None:
    pair.socket.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(ChannelClosedError, match="not our protocol"):
        pair.target.receive()


def test_end_of_file_comes_after_the_frames_before_it(pair: Pair) -> None:
    pair.socket.sendall(encoded(TargetBound(0, 0, [])))
    pair.socket.close()
    assert pair.target.receive() == [TargetBound(0, 0, [])]
    with pytest.raises(ChannelClosedError, match="closed"):
        pair.target.receive()


def test_end_of_file_within_a_frame_is_a_closed_channel(pair: Pair) -> None:
    pair.socket.sendall(encoded(TargetBound(0, 0, []))[:-1])
    pair.socket.close()
    with pytest.raises(ChannelClosedError):
        pair.target.receive()


def test_end_of_file_ends_a_wait(pair: Pair) -> None:
    thread = threading.Timer(0.05, pair.socket.shutdown, [socket.SHUT_RDWR])
    thread.start()
    with pytest.raises(ChannelClosedError):
        pair.target.receive(timeout=None)
    thread.join()


def test_sending_to_a_closed_end_is_a_closed_channel(pair: Pair) -> None:
    pair.socket.close()
    with pytest.raises(ChannelClosedError, match="send"):
        pair.target.send(frame(0))


def test_a_reader_that_does_not_read_fills_the_channel_without_blocking(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "MAX_PENDING_BYTES", 2 * MEGABYTE)
    sent = 0

    def send_until_full() -> None:
        nonlocal sent
        while sent < 100:
            pair.target.send(frame(sent, size=MEGABYTE))
            sent += 1

    with pytest.raises(ChannelFullError, match="wait for the reader"):
        send_until_full()
    # Nothing of the refused frame was sent: only whole frames arrive, and the channel still works.
    frames = receive_all(pair.draft, pair.target)
    assert [a_frame.number for a_frame in frames] == list(range(sent))
    pair.target.send(frame(sent))
    assert receive_all(pair.draft, pair.target) == [frame(sent)]


def test_what_a_draft_sends_while_nobody_reads_is_received_at_once(pair: Pair) -> None:
    # Distributions of many rows, in some steps: more than one read of the socket takes.
    holds = pair.draft_buffer()
    step = Stepped(b"", b"", b"", b"", q_tokens=bytes(100_000))
    count = max(1, holds // 2 // 150_000)
    for number in range(count):
        pair.draft.send(TargetBound(0, number, [step]))
    assert len(pair.target.receive()) == count
