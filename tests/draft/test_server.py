"""The draft server's loop over real sockets, with real clients; only the model is a toy."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.draft.toy_model import ToyModel
from vllm_ssd.core.stats import Stats
from vllm_ssd.draft.agreement import Offer
from vllm_ssd.draft.blocks import KVBlocks
from vllm_ssd.draft.engine import DraftEngine
from vllm_ssd.draft.rows import Rows
from vllm_ssd.draft.server import DraftServer
from vllm_ssd.draft.session import Session
from vllm_ssd.target.client import DraftClient
from vllm_ssd.target.links.attachment import Attachment, ask
from vllm_ssd.wire.address import Address, UnixAddress
from vllm_ssd.wire.channel import Channel, ChannelClosedError, peer_channel
from vllm_ssd.wire.listener import Listener
from vllm_ssd.wire.messages import (
    MAX_PEER_MESSAGES,
    PROTOCOL,
    Allocate,
    DraftBound,
    Finished,
    Join,
    Lost,
    Setup,
    Start,
    TargetBound,
    Verified,
)
from vllm_ssd.wire.network import connect
from vllm_ssd.wire.packing import pack

K, VOCABULARY, LONGEST, BLOCKS = 3, 100, 64, 400
JOIN = Join(PROTOCOL, "hash", VOCABULARY, K, [], 0, 8, "auto", 64, 1.0)
WAIT_SECONDS = 20.0


class Served:
    """A server in a thread.

    Args:
        folder: for its socket.
        most_targets: as of :class:`DraftServer`.
    """

    def __init__(self, folder: Path, most_targets: int = 4) -> None:
        self.server = DraftServer(most_targets)
        rows, blocks = Rows(64, K, 9, 6), KVBlocks(BLOCKS, 4, enable_prefix_caching=True)
        self.blocks = blocks
        model = ToyModel(BLOCKS, 4, VOCABULARY, 9, 6)
        self.engine = DraftEngine(model, rows, blocks, 4, 16, self.server.interrupted)
        self.server.use(self.engine, Offer("toy", "hash", VOCABULARY, K, 8, LONGEST, 6))
        self.address: Address = UnixAddress(str(folder / "draft.sock"))
        self._listener = Listener(self.address, None)
        self._thread = threading.Thread(target=self.server.serve_all, args=(self._listener,))
        self._thread.start()

    def end(self) -> None:
        """Stop it."""
        self.server.stop()
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()
        self._listener.close()

    def client(self, join: Join = JOIN) -> DraftClient:
        """A target's client, that has joined."""
        address = self.address
        client = DraftClient(
            lambda: Attachment("server", lambda _: (address, None)),
            join,
            15.0,
            Stats(),
            lambda: None,
        )
        client.launch()
        until(lambda: client.up, client)
        return client

    def stranger(self) -> Channel[TargetBound]:
        """A peer that says what it likes."""
        return peer_channel(connect(self.address, None, 5.0), TargetBound)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.end()


def until(condition: Callable[[], Any], *clients: DraftClient) -> None:
    """Poll the clients until something holds."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end
        for client in clients:
            client.poll(0.01)
        time.sleep(0.002)


def draft_for(client: DraftClient, handle: int) -> None:
    """Announce a request, and wait until its tree is there."""
    client.send([Start(handle, pack([1, 2, 3, handle % VOCABULARY]), LONGEST - 1, [])])
    until(lambda: handle in client.published.cache.trees, client)


def test_garbage_of_a_peer_costs_the_others_nothing(served: Served) -> None:
    chance = random.Random(0)
    good = served.client()
    encode = msgspec.msgpack.Encoder().encode
    verified = Verified(pack([1]), pack([3]), pack([1]), pack([0]), pack([5]), 0)
    said: list[list[Any]] = [
        [JOIN],
        [JOIN, Start(1, pack([1, 2, 3]), 9, []), verified],
        [Start(1, pack([1, 2, 3]), 9, [])],
        [JOIN, JOIN],
        [JOIN, Finished(pack([1, 2, 3]))],
        [Setup({"model": "evil"}, K, 8, True, VOCABULARY), Allocate(1 << 40)],
    ]
    heard = 0
    for number in range(120):
        peer = served.stranger()
        frame = bytearray(encode(DraftBound(chance.randrange(3), 0, chance.choice(said))))
        for _ in range(chance.randrange(4)):
            frame[chance.randrange(len(frame))] = chance.randrange(256)
        more = chance.randbytes(chance.randrange(200)) if chance.random() < 0.3 else b""
        stream: Any = peer._socket
        with suppress(BrokenPipeError):  # too many at once: it was not let in
            stream.send(len(frame).to_bytes(4, "little") + frame + more)
            heard += 1
        time.sleep(0.005)
        if number % 10 == 0:
            draft_for(good, number)
        peer.close()
    draft_for(good, 1000)
    assert heard > 60
    assert good._stats.resyncs == 0
    until(lambda: served.server.targets == 1, good)
    good.close()
    until(lambda: served.server.targets == 0)
    assert served.blocks.all_free


@pytest.mark.parametrize(
    "wants",
    [
        {"protocol": PROTOCOL + 1},
        {"vocabulary": "other"},
        {"vocab_size": VOCABULARY - 1},
        {"num_speculative_tokens": K + 1},
        {"fan_out": [1]},
        {"fan_out": [2**63] * (K + 1)},
        {"branches": 9, "max_branches": 8},
        {"draft_sampling": "best"},
        {"draft_top_n": 5},
        {"saguaro_c": 2.0},
    ],
)
def test_what_the_draft_cannot_do_is_refused(served: Served, wants: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        ask(served.address, None, msgspec.structs.replace(JOIN, **wants))
    assert served.server.figures()["targets_refused"] == 1


def test_a_step_that_fails_ends_no_connection(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [served.client(), served.client()]
    for client in clients:
        draft_for(client, 1)
    step = served.engine.step
    failed: list[bool] = []

    def fails_once() -> None:
        if not failed:
            failed.append(True)
            raise IndexError("as a bug would")
        step()

    monkeypatch.setattr(served.engine, "step", fails_once)
    clients[0].send([Start(2, pack([9, 8]), LONGEST - 1, [])])
    until(lambda: all(client._stats.resyncs == 1 for client in clients), *clients)
    for client in clients:
        draft_for(client, 3)
        client.close()


def test_a_step_that_fails_while_a_message_waits_for_it_is_not_the_senders_fault(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [served.client(), served.client()]
    for client in clients:
        draft_for(client, 1)
    settle = served.engine._pipeline.settle
    failed: list[bool] = []

    def fails_once() -> Any:
        if not failed:
            failed.append(True)
            raise IndexError("as a bug would")
        return settle()

    monkeypatch.setattr(served.engine._pipeline, "settle", fails_once)
    clients[0].send([Start(2, pack([9, 8]), LONGEST - 1, [])])
    until(lambda: all(client._stats.resyncs == 1 for client in clients), *clients)
    for client in clients:
        draft_for(client, 3)
        client.close()


def test_a_frame_of_many_messages_is_not_taken_in(served: Served) -> None:
    peer = served.stranger()
    starts = [Start(n, pack([1, 2]), 9, []) for n in range(MAX_PEER_MESSAGES)]
    peer.send(DraftBound(1, 0, [JOIN]), DraftBound(1, 1, [*starts, Finished(pack([0]))]))
    answers: list[Any] = []

    def refused() -> bool:
        answers.extend(m for frame in peer.receive(0.01) if frame for m in frame.messages)
        return any(isinstance(answer, Lost) for answer in answers)

    until(refused)
    assert served.server.targets == 1
    assert not any(True for _ in served.engine.allocator.requests())
    peer.close()


def test_connections_that_never_join_are_closed_when_there_are_too_many(served: Served) -> None:
    good = served.client()
    strangers = []
    for _ in range(30):
        strangers.append(served.stranger())
        time.sleep(0.02)
    # As many targets as there may be, 8 more, and the one that has joined.
    until(lambda: len(served.server._lines) <= 4 + 8 + 1, good)
    with pytest.raises(ChannelClosedError):
        strangers[0].receive(1.0)
    draft_for(good, 1)
    good.close()
    for stranger in strangers:
        stranger.close()


def test_there_are_signs_of_life_while_another_targets_message_takes_long(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, other = served.client(), served.client()
    draft_for(other, 1)
    start = Session.start

    def takes_long(session: Session, message: Start) -> None:
        if message.handle == 7:
            time.sleep(2.0)
        start(session, message)

    monkeypatch.setattr(Session, "start", takes_long)
    slow.send([Start(7, pack([1, 2]), LONGEST - 1, [])])
    time.sleep(0.3)
    received = other.received
    other.send([Start(2, pack([1, 2]), LONGEST - 1, [])])
    time.sleep(1.2)
    other.poll()
    assert other.received > received
    assert 2 not in other.published.cache.trees
    for client in (slow, other):
        client.close()


def test_a_peer_has_no_say_in_what_the_server_loads(served: Served) -> None:
    peer = served.stranger()
    setup = Setup({"model": "evil", "trust_remote_code": True}, K, 8, True, VOCABULARY)
    peer.send(DraftBound(1, 0, [setup]), DraftBound(1, 1, [Allocate(1)]))
    answers: list[Any] = []
    end = time.monotonic() + WAIT_SECONDS
    while not answers and time.monotonic() < end:
        for frame in peer.receive(0.1):
            answers += frame.messages if frame is not None else []
    assert [type(answer) for answer in answers] == [Lost]
    peer.close()
    draft_for(served.client(), 1)


def test_asking_is_not_joining(tmp_path: Path) -> None:
    served = Served(tmp_path, most_targets=1)
    client = served.client()
    ask(served.address, None, JOIN)
    assert served.server.figures()["targets_joined"] == 1
    with pytest.raises(ValueError, match="tokenizer"):
        ask(served.address, None, msgspec.structs.replace(JOIN, vocabulary="other"))
    full = served.stranger()
    full.send(DraftBound(1, 0, [JOIN]))
    until(lambda: served.server.figures()["targets_refused"] == 2, client)
    full.close()
    client.close()
    served.end()


def test_a_target_that_was_busy_while_it_joined_is_served(served: Served) -> None:
    address = served.address
    client = DraftClient(
        lambda: Attachment("server", lambda _: (address, None)), JOIN, 0.5, Stats(), lambda: None
    )
    client.launch()
    time.sleep(1.0)  # it loads its weights, and looks at nothing meanwhile
    client.maintain()
    until(lambda: client.up, client)
    assert client._stats.restarts == 0
    client.close()


def test_an_idle_target_is_told_nothing(served: Served) -> None:
    idle, busy = served.client(), served.client()
    draft_for(idle, 1)
    idle.send([Finished(pack([1]))])
    time.sleep(0.6)
    idle.poll()
    time.sleep(0.6)
    received = idle.received
    for number in range(8):
        draft_for(busy, number)
        busy.send([Finished(pack([number]))])
        time.sleep(0.15)
    idle.poll()
    assert idle.received <= received + 1
    assert busy.reported.counters["draft_steps"] > 0
    for client in (idle, busy):
        client.close()


def test_signs_of_life_are_for_targets_that_wait(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle, busy = served.client(), served.client()
    draft_for(idle, 1)
    idle.send([Finished(pack([1]))])
    time.sleep(0.6)
    idle.poll()
    step = served.engine.step

    def takes_long() -> None:
        time.sleep(1.6)
        step()

    monkeypatch.setattr(served.engine, "step", takes_long)
    before = idle.received, busy.received
    busy.send([Start(1, pack([1, 2, 3]), LONGEST - 1, [])])
    time.sleep(0.2)
    # It is not read before the step ends.
    busy.send([Start(2, pack([7, 8, 9]), LONGEST - 1, [])])
    time.sleep(1.2)
    idle.poll()
    busy.poll()
    monkeypatch.undo()
    assert idle.received == before[0]
    assert busy.received >= before[1] + 2
    until(lambda: 2 in busy.published.cache.trees, busy)
    for client in (idle, busy):
        client.close()


def test_a_message_that_takes_long_to_arrive_is_answered_by_signs_of_life(served: Served) -> None:
    slow, idle = served.client(), served.client()
    time.sleep(0.6)
    for client in (slow, idle):
        client.poll()
    before = slow.received, idle.received
    assert slow.link is not None
    assert slow.link.channel is not None
    half = len(b"so much") * 2
    os.write(slow.link.channel.fileno(), half.to_bytes(4, "little") + b"so much")
    time.sleep(1.6)
    slow.poll()
    idle.poll()
    assert slow.received >= before[0] + 2
    assert idle.received == before[1]
    for client in (slow, idle):
        client.close()


def test_steps_before_a_target_came_are_not_its(served: Served) -> None:
    first = served.client()
    for number in range(30):
        draft_for(first, number)
    time.sleep(0.3)
    before = served.engine.steps
    second = served.client()
    draft_for(second, 1)
    second.send([Start(2, pack([7, 8, 9]), LONGEST - 1, [])])
    until(lambda: second.reported.counters, first, second)
    assert second.reported.counters["draft_steps"] <= served.engine.steps - before
    for client in (first, second):
        client.close()


def test_a_text_may_hold_tokens_that_the_draft_does_not_have(served: Served) -> None:
    client = served.client(msgspec.structs.replace(JOIN, vocab_size=VOCABULARY + 28))
    client.send([Start(1, pack([1, VOCABULARY + 5, 3]), LONGEST - 1, [])])
    draft_for(client, 2)
    assert client._stats.resyncs == 0
    client.close()
