"""Frames between processes that met by address, over a Unix socket and over TLS."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.wire.serving import (
    MEGABYTE,
    EchoServer,
    answer,
    encoded,
    eventually,
    is_answered,
    lost,
    push,
    question,
)
from vllm_ssd.wire.address import TCPAddress, UnixAddress
from vllm_ssd.wire.channel import (
    PEER_FRAME_BYTES,
    PEER_RECEIVE_BYTES,
    Channel,
    ChannelClosedError,
    Stream,
    peer_channel,
)
from vllm_ssd.wire.keys import new_key, write_key
from vllm_ssd.wire.listener import Listener
from vllm_ssd.wire.messages import DraftBound, TargetBound
from vllm_ssd.wire.network import DEAD_SECONDS, connect


@pytest.fixture(params=["unix", "tls"])
def ends(request: pytest.FixtureRequest, tmp_path: object) -> Iterator[tuple[Stream, Stream]]:
    """The two ends of a connection: a target's and a draft server's."""
    is_tls = request.param == "tls"
    key = new_key() if is_tls else None
    listener = Listener(TCPAddress("127.0.0.1", 0) if is_tls else UnixAddress(f"{tmp_path}/s"), key)
    target = connect(listener.address, key, 5.0)
    select.select([listener], [], [], 5.0)
    (draft,) = listener.accept()
    yield target, draft
    target.close()
    draft.close()
    listener.close()


def test_frames_are_answered(server: EchoServer) -> None:
    target = server.target()
    for number in range(100):
        assert is_answered(target, number, size=number)
    target.close()


def test_several_targets_are_served(server: EchoServer) -> None:
    targets = [server.target() for _ in range(5)]
    for number, target in enumerate(targets):
        assert is_answered(target, number)
    for target in targets:
        target.close()
    assert eventually(lambda: not server.peers)


def test_long_frames_go_both_ways_at_once_past_slow_readers(ends: tuple[Stream, Stream]) -> None:
    target = peer_channel(ends[0], TargetBound)
    draft = peer_channel(ends[1], DraftBound)
    size, count = 10 * MEGABYTE, 3
    arrived: dict[str, list[object]] = {"target": [], "draft": []}

    def read(name: str, channel: Channel[TargetBound] | Channel[DraftBound]) -> None:
        deadline = time.monotonic() + 20.0
        while len(arrived[name]) < count and time.monotonic() < deadline:
            arrived[name] += channel.receive(timeout=1.0)
            time.sleep(0.001)

    readers = [
        threading.Thread(target=read, args=("target", target)),
        threading.Thread(target=read, args=("draft", draft)),
    ]
    for reader in readers:
        reader.start()
    for number in range(count):  # while both ends are read from by other threads
        target.send(question(number, size))
        draft.send(answer(0, number, size))
    for reader in readers:
        reader.join()
    assert arrived["draft"] == [question(number, size) for number in range(count)]
    assert arrived["target"] == [answer(0, number, size) for number in range(count)]


def test_one_thread_may_send_while_another_receives(server: EchoServer) -> None:
    target = server.target()
    count, size = 2000, 3000
    got: list[TargetBound | None] = []

    def read() -> None:
        deadline = time.monotonic() + 20.0
        while len(got) < count and time.monotonic() < deadline:
            got.extend(target.receive(timeout=1.0))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(count):
        target.send(question(number, size))
    reader.join()
    assert got == [answer(0, number, size) for number in range(count)]
    target.close()


def test_sending_does_not_wait_for_a_reader_that_does_not_read(
    ends: tuple[Stream, Stream],
) -> None:
    target = peer_channel(ends[0], TargetBound)
    target.send(question(0, 10 * MEGABYTE))
    began = time.monotonic()
    for number in range(1, 100):
        target.send(question(number, 100))
        assert target.receive() == []
    assert time.monotonic() - began < 1.0
    assert not target.flush()
    began = time.monotonic()
    target.close()  # while its thread waits for the reader
    assert time.monotonic() - began < 1.0


def test_the_frames_of_one_call_leave_together(ends: tuple[Stream, Stream]) -> None:
    frames = [question(number, 1000) for number in range(5)]
    peer_channel(ends[0], TargetBound).send(*frames)
    select.select([ends[1].fileno()], [], [], 5.0)
    ends[1].setblocking(False)
    with memoryview(bytearray(MEGABYTE)) as buffer:
        size = ends[1].recv_into(buffer)
        assert bytes(buffer[:size]) == b"".join(map(encoded, frames))


def test_one_call_takes_a_bounded_part_of_a_flood(ends: tuple[Stream, Stream]) -> None:
    draft = peer_channel(ends[1], DraftBound)
    frame = encoded(DraftBound(0, 0, []))
    count = MEGABYTE // len(frame)
    flood = threading.Thread(target=push, args=(ends[0], frame * count))
    flood.start()
    total = longest = 0
    while total < count and select.select([draft], [], [], 5.0)[0]:  # by the descriptor alone
        took = len(draft.receive())
        total, longest = total + took, max(longest, took)
    flood.join()
    assert total == count
    assert longest <= 2 * PEER_RECEIVE_BYTES // len(frame)


def test_a_frame_past_the_peers_bound_loses_only_that_peer(server: EchoServer) -> None:
    other = server.target()
    stream = server.connect()
    push(stream, (PEER_FRAME_BYTES + 1).to_bytes(4, "little"))
    assert lost(peer_channel(stream, TargetBound))
    stream.close()
    assert is_answered(other, 1)
    with pytest.raises(ValueError, match="at most"):
        other.send(question(2, PEER_FRAME_BYTES))
    assert is_answered(other, 3)
    other.close()


def test_what_was_sent_before_the_end_arrives(ends: tuple[Stream, Stream]) -> None:
    draft = peer_channel(ends[1], DraftBound)
    target = peer_channel(ends[0], TargetBound)
    target.send(question(1), question(2))
    target.close()
    assert draft.receive(5.0) == [question(1), question(2)]
    with pytest.raises(ChannelClosedError):
        draft.receive(5.0)


def test_sending_to_an_end_that_is_gone_is_a_closed_channel(ends: tuple[Stream, Stream]) -> None:
    target = peer_channel(ends[0], TargetBound)
    ends[1].close()

    def send_on() -> None:
        for number in range(100):
            target.send(question(number, 100))
            time.sleep(0.01)

    with pytest.raises(ChannelClosedError, match="send"):
        send_on()


TARGET = """
import sys, time
from vllm_ssd.wire.address import parse_address
from vllm_ssd.wire.channel import peer_channel
from vllm_ssd.wire.keys import read_key
from vllm_ssd.wire.messages import DraftBound, Finished, TargetBound
from vllm_ssd.wire.network import connect
key = read_key(sys.argv[2]) if sys.argv[2] else None
channel = peer_channel(connect(parse_address(sys.argv[1]), key, 5.0), TargetBound)
channel.send(DraftBound(0, 0, [Finished(b"")]))
channel.receive(None)
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("transport", ["unix", "tls"])
def test_the_end_of_a_killed_process_is_seen(transport: str, tmp_path: object) -> None:
    key = write_key(f"{tmp_path}/key") if transport == "tls" else None
    address = TCPAddress("127.0.0.1", 0) if key else UnixAddress(f"{tmp_path}/s")
    with EchoServer(Listener(address, key), key) as server:
        other = server.target()
        arguments = [str(server.listener.address), f"{tmp_path}/key" if key else ""]
        command = [sys.executable, "-c", TARGET, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            assert len(server.peers) == 2
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert eventually(lambda: len(server.peers) == 1, 2.0)
        assert is_answered(other, 1)
        other.close()


def test_a_server_that_is_gone_is_the_end_of_file(tls_server: EchoServer) -> None:
    target = tls_server.target()
    assert is_answered(target, 0)
    for peer in list(tls_server.peers.values()):
        with socket.socket(fileno=os.dup(peer.fileno())) as connection:
            connection.shutdown(socket.SHUT_RDWR)
    assert lost(target)
    target.close()


def test_a_dead_host_would_be_noticed(ends: tuple[Stream, Stream]) -> None:
    if ends[0].family == socket.AF_UNIX:
        pytest.skip("a Unix socket leads to no other host")
    for end in ends:
        with socket.socket(fileno=os.dup(end.fileno())) as tcp:
            options = {
                name: tcp.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"))
                for name in ("NODELAY", "KEEPIDLE", "KEEPINTVL", "KEEPCNT", "USER_TIMEOUT")
            }
            assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert options["NODELAY"]
        idle = options["KEEPIDLE"] + options["KEEPCNT"] * options["KEEPINTVL"]
        assert idle <= DEAD_SECONDS
        assert options["USER_TIMEOUT"] == DEAD_SECONDS * 1000


def test_a_listener_on_ipv6() -> None:
    key = new_key()
    try:
        listener = Listener(TCPAddress("::1", 0), key)
    except OSError:
        pytest.skip("no IPv6 here")
    with EchoServer(listener, key) as server:
        target = server.target()
        assert is_answered(target, 0)
        target.close()


def test_a_port_that_is_taken_is_named() -> None:
    key = new_key()
    first = Listener(TCPAddress("127.0.0.1", 0), key)
    with pytest.raises(OSError, match=f"cannot listen at {first.address}: Address already in use"):
        Listener(first.address, key)
    first.close()


def test_without_descriptors_the_listener_waits_and_goes_on(tmp_path: object) -> None:
    listener = Listener(UnixAddress(f"{tmp_path}/s"), None)
    peer = socket.socket(socket.AF_UNIX)
    with open(os.devnull, "rb") as lowest_free:
        lowest = lowest_free.fileno()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        used = time.process_time()
        peer.connect(f"{tmp_path}/s")
        time.sleep(0.3)
        assert time.process_time() - used < 0.1
        assert listener.accept() == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert select.select([listener], [], [], 5.0)[0]
    (stream,) = listener.accept()
    stream.close()
    peer.close()
    listener.close()
