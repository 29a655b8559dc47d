"""Arrays of numbers as bytes: what messages carry in place of lists."""

from __future__ import annotations

import sys
from array import array

import numpy as np
from numpy.typing import NDArray

_INT32, _FLOAT32 = np.dtype("<i4"), np.dtype("<f4")
"""Made once: NumPy takes longer to parse such a name than to wrap the bytes."""


def pack(values: list[int] | NDArray[np.int32]) -> bytes:
    """Integers as int32 bytes.

    Raises:
        OverflowError: one of a list does not fit into 32 bits.
    """
    if isinstance(values, list):
        # Several times as fast as NumPy, which checks each element's type.
        packed = array("i", values)
        if sys.byteorder == "big":
            packed.byteswap()
        return packed.tobytes()
    return np.asarray(values, _INT32).tobytes()


def unpack(data: bytes) -> NDArray[np.int32]:
    """The reverse of :func:`pack`; a read-only view.

    Raises:
        ValueError: the length is not a multiple of four bytes.
    """
    return np.frombuffer(data, _INT32)


def pack_floats(values: NDArray[np.float32]) -> bytes:
    """Numbers as float32 bytes."""
    return np.asarray(values, _FLOAT32).tobytes()


def unpack_floats(data: bytes) -> NDArray[np.float32]:
    """The reverse of :func:`pack_floats`; a read-only view.

    Raises:
        ValueError: the length is not a multiple of four bytes.
    """
    return np.frombuffer(data, _FLOAT32)


def unpack_list(data: bytes) -> list[int]:
    """The reverse of :func:`pack`, as a list: for a few numbers much faster than an array.

    Raises:
        ValueError: the length is not a multiple of four bytes.
    """
    unpacked = array("i", data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked.tolist()
