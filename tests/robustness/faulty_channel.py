"""A channel that loses, doubles, delays, reorders and garbles frames, on purpose."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import numpy as np

from vllm_ssd.wire.channel import Channel
from vllm_ssd.wire.messages import DraftBound, Failed, Report, TargetBound
from vllm_ssd.wire.packing import pack, unpack

Fault = Literal["lose", "duplicate", "delay", "reorder", "undecodable", "garbage"]
FAULTS: tuple[Fault, ...] = ("lose", "duplicate", "delay", "reorder", "undecodable", "garbage")
Direction = Literal["to draft", "to target"]

Frame = DraftBound | TargetBound
_MAX_DELAY = 6
"""Frames that overtake a delayed one, at most."""
_ABSURD = (-(2**31), -1, 0, 1, 7, 511, 512, 2**31 - 1)


class FaultyChannel:
    """Stands in for a :class:`Channel` of the target's and disturbs what goes through it.

    Args:
        channel: the real one.
        direction: which frames are disturbed.
        fault: how.
        rate: the chance that a frame is.
        seed: of that chance.
    """

    def __init__(
        self,
        channel: Channel[TargetBound],
        direction: Direction,
        fault: Fault,
        rate: float,
        seed: int,
    ) -> None:
        self.disturbed = 0
        """Frames that were."""
        self._channel = channel
        self._direction = direction
        self._fault = fault
        self._rate = rate
        self._random = random.Random(seed)
        self._held: list[tuple[int, Frame]] = []
        """Frames on their way, with how many others go first."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def send(self, *frames: DraftBound) -> None:
        """As :meth:`Channel.send`."""
        if self._direction != "to draft":
            self._channel.send(*frames)
            return
        for frame in frames:
            for passed in self._disturb(frame):
                if passed is None:
                    self._send_undecodable()
                else:
                    self._channel.send(passed)

    def receive(self, timeout: float | None = 0.0) -> list[TargetBound | None]:
        """As :meth:`Channel.receive`."""
        frames = self._channel.receive(timeout)
        if self._direction != "to target":
            return frames
        disturbed: list[Any] = []
        for frame in frames:
            disturbed += [None] if frame is None else self._disturb(frame)
        return disturbed

    def _send_undecodable(self) -> None:
        # The length is right: what is inside it is not.
        payload = self._random.randbytes(self._random.randrange(64))
        self._channel._append(len(payload).to_bytes(4, "little") + payload)

    def _disturb(self, frame: Frame) -> list[Frame | None]:
        """What goes through in place of a frame, late ones that are due included."""
        late = self._release()
        if self._random.random() >= self._rate:
            return [frame, *late]
        self.disturbed += 1
        match self._fault:
            case "lose":
                return late
            case "duplicate":
                return [frame, frame, *late]
            case "delay":
                self._held.append((self._random.randint(1, _MAX_DELAY), frame))
                return late
            case "reorder":
                self._held.append((0, frame))
                return late
            case "undecodable":
                return [None, *late]
            case "garbage":
                return [garbled(frame, self._random), *late]

    def _release(self) -> list[Frame | None]:
        due: list[Frame | None] = [frame for wait, frame in self._held if wait == 0]
        self._held = [(wait - 1, frame) for wait, frame in self._held if wait > 0]
        return due


def garbled(frame: Frame, source: random.Random) -> Frame:
    """The frame with one of its fields replaced by something else of the same type."""
    what = source.random()
    if what < 0.1:
        return msgspec.structs.replace(frame, epoch=frame.epoch + source.choice((-1, 1, 5, 2**40)))
    if what < 0.2:
        return msgspec.structs.replace(frame, number=frame.number + source.choice((1, -1, 2**40)))
    # Not failures, which end the draft when reported, nor counters, which are only shown.
    candidates = [
        i
        for i, m in enumerate(frame.messages)
        if not isinstance(m, (Failed, Report)) and _fields(m)
    ]
    if not candidates:
        return msgspec.structs.replace(frame, number=frame.number + 1)
    messages: list[Any] = list(frame.messages)
    at = source.choice(candidates)
    name = source.choice(_fields(messages[at]))
    value = _other(getattr(messages[at], name), source)
    messages[at] = msgspec.structs.replace(messages[at], **{name: value})
    return msgspec.structs.replace(frame, messages=messages)


def _fields(message: msgspec.Struct) -> list[str]:
    """Fields that can be garbled: numbers and arrays."""
    return [f for f in message.__struct_fields__ if isinstance(getattr(message, f), (int, bytes))]


def _other(value: int | bytes, source: random.Random) -> int | bytes:
    if isinstance(value, int):
        return source.choice(_ABSURD)
    ways: list[Callable[[bytes], bytes]] = [
        lambda _: b"",
        lambda data: data[:-4],
        lambda data: data[:-1],
        lambda data: data + pack([source.choice(_ABSURD)]),
        lambda data: _with_one_element(data, source.choice(_ABSURD), source),
        lambda data: _with_one_element(data, source.randrange(512), source),
    ]
    return source.choice(ways)(value)


def _with_one_element(data: bytes, value: int, source: random.Random) -> bytes:
    array = np.array(unpack(data))
    if array.size:
        array[source.randrange(array.size)] = value
    return pack(array)
