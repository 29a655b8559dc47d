"""Every message arrives as it was sent."""

from __future__ import annotations

import typing
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.wire.messages import DraftBound, Message, TargetBound, ToDraft, ToTarget
from vllm_ssd.wire.packing import pack, unpack, unpack_list

_FIELDS: dict[Any, st.SearchStrategy[Any]] = {
    # What msgpack holds; positions, counts and times are far smaller.
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: st.text(),
    bytes: st.binary(),
}


def _strategy(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if kind in _FIELDS:
        return _FIELDS[kind]
    if kind is type(None):
        return st.none()
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return st.lists(_strategy(arguments[0]), max_size=5)
    if origin is dict:
        return st.dictionaries(_strategy(arguments[0]), _strategy(arguments[1]), max_size=5)
    return st.one_of([_strategy(member) for member in arguments])


def _messages(union: Any) -> st.SearchStrategy[Any]:
    """Messages of every type of a union."""
    types: tuple[type[Message], ...] = typing.get_args(union)
    strategies = []
    for kind in types:
        hints = typing.get_type_hints(kind)
        fields = {name: _strategy(hints[name]) for name in kind.__struct_fields__}
        strategies.append(st.builds(kind, **fields))
    return st.one_of(strategies)


def _same(sent: Any, arrived: Any) -> bool:
    """Equality down to the types, which a float that arrived as an int would not have."""
    return type(sent) is type(arrived) and repr(sent) == repr(arrived)


@given(st.lists(_messages(ToDraft), max_size=4), st.integers(0, 2**31), st.integers(0, 2**31))
def test_messages_to_the_draft_arrive_as_they_were(
    messages: list[Any], epoch: int, number: int
) -> None:
    frame = DraftBound(epoch, number, messages)
    assert _same(frame, msgspec.msgpack.decode(msgspec.msgpack.encode(frame), type=DraftBound))


@given(st.lists(_messages(ToTarget), max_size=4), st.integers(0, 2**31), st.integers(0, 2**31))
def test_messages_to_the_target_arrive_as_they_were(
    messages: list[Any], epoch: int, number: int
) -> None:
    frame = TargetBound(epoch, number, messages)
    assert _same(frame, msgspec.msgpack.decode(msgspec.msgpack.encode(frame), type=TargetBound))


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_packed_integers_unpack_as_they_were(values: list[int]) -> None:
    assert unpack(pack(values)).tolist() == values
    assert unpack_list(pack(values)) == values
    array = np.array(values, np.int32)
    assert pack(array) == pack(values)
    assert unpack(pack(array)).dtype == np.int32
    assert len(pack(array)) == 4 * len(values)


def test_an_integer_that_is_no_int32_is_refused() -> None:
    with pytest.raises(OverflowError):
        pack([2**31])


def test_bytes_that_are_no_int32_array_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        unpack(b"12345")


def test_a_frame_for_one_side_is_garbage_to_the_other() -> None:
    @given(_messages(ToTarget))
    def check(message: Any) -> None:
        data = msgspec.msgpack.encode(TargetBound(0, 0, [message]))
        with pytest.raises(msgspec.DecodeError):
            msgspec.msgpack.decode(data, type=DraftBound)

    check()
