"""TFRecord files: records with a checksum each."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed: RFC 3720, appendix B.4
_ALL_ONES = 0xFFFFFFFF
_MASK_DELTA = 0xA282EAD8  # tensorflow/core/lib/hash/crc32c.h
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_HEAD = _LENGTH.size + _CHECKSUM.size


class RecordError(ValueError):
    """The file is damaged."""


def records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a TFRecord file's bytes.

    Raises:
        RecordError: at the first record that ends too early or does not match its checksum.
    """
    start = 0
    while start < len(data):
        head = data[start : start + _HEAD]
        if len(head) < _HEAD or not _matches(head[: _LENGTH.size], head[_LENGTH.size :]):
            raise RecordError("the length is damaged")
        (length,) = _LENGTH.unpack_from(head)
        end = start + _HEAD + length
        record, checksum = data[start + _HEAD : end], data[end : end + _CHECKSUM.size]
        if len(checksum) < _CHECKSUM.size:
            raise RecordError("the file ends in the middle of it")
        if not _matches(record, checksum):
            raise RecordError("it does not match its checksum")
        yield record
        start = end + _CHECKSUM.size


def _matches(data: bytes, checksum: bytes) -> bool:
    crc = crc32c(data)
    masked = (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & _ALL_ONES
    return checksum == _CHECKSUM.pack(masked)


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C of ``data``.

    The data is cut into equal lanes, and all lanes go through the table together; a checksum is linear, so
    that those of the lanes can be put together afterwards.
    """
    if len(data) < _CHECKSUM.size:
        return _finished(_advance(np.array([_ALL_ONES], np.uint32), _bytes(data)[:, None]))
    width = isqrt(len(data))
    count = -(-len(data) // width)
    flat = np.zeros(count * width, np.uint8)  # zeros in front change nothing while the state is zero
    flat[-len(data) :] = _bytes(data)
    flat[-len(data) :][: _CHECKSUM.size] ^= 0xFF  # the same as starting with all ones
    lanes = _advance(np.zeros(count, np.uint32), flat.reshape(count, width).T)
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    moved = _advance(bits, np.zeros((width, 1), np.uint8))  # what becomes of each bit in a lane of zeros
    state = np.uint32(0)
    for lane in lanes:
        state = np.bitwise_xor.reduce(moved[(state & bits) != 0]) ^ lane
    return _finished(np.array([state]))


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def _advance(states: NDArray[np.uint32], columns: NDArray[np.uint8]) -> NDArray[np.uint32]:
    table = _table()
    for column in columns:
        states = table[(states ^ column) & np.uint32(0xFF)] ^ (states >> np.uint32(8))
    return states


def _finished(states: NDArray[np.uint32]) -> int:
    return int(states[0]) ^ _ALL_ONES


@cache
def _table() -> NDArray[np.uint32]:
    table: NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        odd = table & np.uint32(1)
        table = (table >> np.uint32(1)) ^ (odd * np.uint32(_POLYNOMIAL))
    return table
