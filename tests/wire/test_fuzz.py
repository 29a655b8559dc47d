"""Random and mutated bytes, before and after the handshake: only their connection is lost."""

from __future__ import annotations

import os
import random
import resource
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.serving import (
    EchoServer,
    encoded,
    eventually,
    is_answered,
    is_closed,
    push,
    question,
    stranger,
)
from vllm_ssd.wire.address import TCPAddress
from vllm_ssd.wire.channel import PEER_FRAME_BYTES, Channel
from vllm_ssd.wire.keys import new_key
from vllm_ssd.wire.listener import Listener
from vllm_ssd.wire.messages import (
    PROTOCOL,
    Allocate,
    DraftBound,
    Finished,
    Join,
    Proposed,
    Setup,
    Start,
    TargetBound,
    Trimmed,
    Verified,
)
from vllm_ssd.wire.packing import pack

TWO = pack([1, 2])
SAMPLES = [
    DraftBound(0, 0, [Setup({"model": "draft"}, 4, 32, True, 1000), Allocate(1 << 30)]),
    DraftBound(0, 0, [Join(PROTOCOL, "", 1000, 4, [3, 2], 0, 32)]),
    DraftBound(1, 2, [Start(3, pack([1, 2, 3]), 100, [0], 0.7, 20, 0.9)]),
    DraftBound(1, 3, [Verified(TWO, TWO, TWO, TWO, TWO, 5), Proposed(TWO, TWO, TWO)]),
    DraftBound(1 << 40, 4, [Trimmed(pack([1]), pack([0])), Finished(pack([1]))]),
]


class Fuzzed:
    """A server with one target that must be served whatever the others send."""

    def __init__(self, server: EchoServer) -> None:
        self.server = server
        self.target: Channel[TargetBound] = server.target()
        self._number = 0

    def is_served(self) -> bool:
        """Whether the target is, and so are new ones."""
        self._number += 1
        return is_answered(self.target, self._number)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    key = new_key()
    with EchoServer(Listener(TCPAddress("127.0.0.1", 0), key), key) as server:
        fuzzed = Fuzzed(server)
        yield fuzzed
        fuzzed.target.close()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Frames with some bytes changed, cut out or put in; their lengths may still be right."""
    data = bytearray(draw(st.sampled_from([encoded(sample) for sample in SAMPLES])))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    if draw(st.booleans()) and len(data) > 4:
        data[:4] = struct.pack("<I", len(data) - 4)
    return bytes(data)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.binary(max_size=300), mutated()), min_size=1, max_size=4))
def test_any_bytes_after_the_handshake(fuzzed: Fuzzed, parts: list[bytes]) -> None:
    stream = fuzzed.server.connect()
    push(stream, b"".join(parts))
    assert fuzzed.is_served()
    stream.close()


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_before_the_handshake(fuzzed: Fuzzed, data: bytes, is_hello: bool) -> None:
    with stranger(fuzzed.server) as client:
        push(client, b"\x16\x03\x01" * is_hello + data)
        assert fuzzed.is_served()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "mutated"])
def test_ten_million_bytes(fuzzed: Fuzzed, kind: str) -> None:
    chance = random.Random(kind)
    samples = [encoded(sample) for sample in SAMPLES] + [encoded(question(0, 1000))]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    descriptors = len(os.listdir("/proc/self/fd"))
    sent = 0
    while sent < 10_000_000:
        stream = fuzzed.server.connect()
        while sent < 10_000_000:
            data = bytearray(chance.choice(samples))
            if kind == "random":
                data = bytearray(chance.randbytes(chance.randint(1, 2000)))
            for _ in range(chance.randint(0, 3) if kind == "mutated" else 0):
                data[chance.randrange(len(data))] = chance.randrange(256)
            if chance.random() < 0.95 and len(data) > 4:  # the server goes on after such a frame
                data[:4] = struct.pack("<I", len(data) - 4)
            push(stream, bytes(data))
            sent += len(data)
            if len(data) > 4 and struct.unpack_from("<I", data)[0] > PEER_FRAME_BYTES:
                break
        is_closed(stream, 0.2)  # it may also wait for the rest of a long frame
        stream.close()
        assert fuzzed.is_served()
    assert fuzzed.server.garbled > 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 128 << 10  # KiB
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) == descriptors)
