"""Tensors on their way through the front: raw bytes with a dtype and a shape, cut and joined by rows.

The front never needs the numbers themselves, so it makes no numpy array of them. Only the offsets of
string tensors are looked into, since cutting and joining rows moves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from modelport.tensors import DType, string_offsets

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OFFSET = np.dtype("<u4")

Buffer = bytes | memoryview


class RawTensor(NamedTuple):
    """A tensor in the wire format's layout."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    data: Buffer

    @property
    def pieces(self) -> tuple[Buffer, ...]:
        """Its data, as ``Gathered`` has it."""
        return (self.data,)

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self.shape[1:]

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Gathered:
    """A tensor whose rows lie in several places, to be written one after another somewhere else."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Buffer, ...]


def _row_offsets(tensor: RawTensor) -> NDArray[np.uint32]:
    return np.frombuffer(tensor.data, _OFFSET, tensor.elements + 1)


def cut(tensor: RawTensor, start: int, stop: int) -> Buffer:
    """Returns rows ``start`` to ``stop`` of ``tensor``, in the wire format's layout."""
    if start == 0 and stop == tensor.shape[0]:
        return tensor.data
    width = math.prod(tensor.inner)
    if not tensor.dtype.is_string:
        stride = width * tensor.dtype.itemsize
        numbers: Buffer = memoryview(tensor.data)[start * stride : stop * stride]
        return numbers
    offsets = _row_offsets(tensor)
    part = offsets[start * width : stop * width + 1]
    head = offsets.nbytes
    strings = memoryview(tensor.data)[head + int(part[0]) : head + int(part[-1])]
    return b"".join([(part - part[0]).astype(_OFFSET).tobytes(), strings])


def join(dtype: DType, pieces: Sequence[tuple[int, Buffer]]) -> Buffer:
    """Returns the elements of ``pieces``, each a count and its data, one after another."""
    if len(pieces) == 1:
        return pieces[0][1]
    if not dtype.is_string:
        return b"".join(data for _, data in pieces)
    heads: list[NDArray[np.uint32]] = []
    bodies: list[Buffer] = []
    end = 0
    for count, data in pieces:
        offsets = np.frombuffer(data, _OFFSET, count + 1)
        heads.append(offsets[:-1] + np.uint32(end))
        bodies.append(memoryview(data)[offsets.nbytes :])
        end += len(bodies[-1])
    head = np.concatenate([*heads, np.array([end], _OFFSET)]).astype(_OFFSET)
    return b"".join([head.tobytes(), *bodies])


def join_rows(tensors: Sequence[RawTensor]) -> RawTensor:
    """Returns one tensor with the rows of ``tensors``, which agree in all but their first dimension."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    data = join(first.dtype, [(tensor.elements, tensor.data) for tensor in tensors])
    return RawTensor(first.name, first.dtype, (sum(t.shape[0] for t in tensors), *first.inner), data)


def gather_rows(tensors: Sequence[RawTensor]) -> Gathered:
    """Returns what ``join_rows`` does, without a copy where that is possible."""
    first = tensors[0]
    shape = (sum(tensor.shape[0] for tensor in tensors), *first.inner)
    pieces = (join_rows(tensors).data,) if first.dtype.is_string else tuple(tensor.data for tensor in tensors)
    return Gathered(first.name, first.dtype, shape, pieces)


def cut_rows(tensor: RawTensor, start: int, stop: int) -> RawTensor:
    """Returns rows ``start`` to ``stop`` of ``tensor`` as a tensor, a view where that is possible."""
    return RawTensor(tensor.name, tensor.dtype, (stop - start, *tensor.inner), cut(tensor, start, stop))


def row_cutter(tensor: RawTensor) -> Callable[[int, int], RawTensor]:
    """Returns what returns rows from one to another of ``tensor`` as a tensor that owns its data."""
    name, dtype, inner = tensor.name, tensor.dtype, tensor.inner
    if dtype.is_string:
        return lambda start, stop: owned(cut_rows(tensor, start, stop))
    stride, data = math.prod(inner) * dtype.itemsize, tensor.data
    return lambda start, stop: RawTensor(
        name, dtype, (stop - start, *inner), bytes(data[start * stride : stop * stride])
    )


def owned(tensor: RawTensor) -> RawTensor:
    """Returns ``tensor`` with its data copied out of the memory that it looks at."""
    return RawTensor(tensor.name, tensor.dtype, tensor.shape, bytes(tensor.data))


def checked_strings(tensor: RawTensor) -> RawTensor:
    """Returns ``tensor`` after checking its offsets, if it holds strings.

    Raises:
        modelport.tensors.TensorError: if the offsets are not legal.
    """
    if tensor.dtype.is_string:
        string_offsets(tensor.data, tensor.elements)
    return tensor
