"""The tensor codec: numpy arrays to and from ``modelport.v1.Tensor``.

Numbers travel as one bytes field, little-endian, in C order. Strings travel as ``n + 1``
little-endian uint32 offsets followed by the joined bytes; ``protos/modelport/v1/tensor.proto``
defines both layouts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelport.names import shown
from modelport.v1 import tensor_pb2

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

MAX_RANK = 32
"""The most dimensions that a tensor may have: what every supported numpy can represent."""

_OFFSET = np.dtype("<u4")
_MOST_ELEMENTS = 2**59
"""Of 16 bytes at most, as many as numpy can count, dimensions of 0 left out."""


class TensorError(ValueError):
    """A tensor that breaks the rules of the wire format, or an array that has no tensor type."""


@dataclass(frozen=True, slots=True)
class DType:
    """The type of a tensor's elements."""

    name: str
    """numpy's name, for example ``float32``; ``bfloat16`` and ``string`` besides."""
    number: int
    """The number in ``modelport.v1.DataType``."""
    storage: np.dtype[Any] | None
    """How numpy holds the bytes, little-endian; uint16 for bfloat16, None for strings."""

    @property
    def itemsize(self) -> int:
        """The bytes that one element takes; 0 for strings, whose elements vary."""
        return self.storage.itemsize if self.storage is not None else 0

    @property
    def is_string(self) -> bool:
        """Whether elements are byte strings."""
        return self.storage is None


def _table() -> dict[str, DType]:
    names = [n for n in tensor_pb2.DataType.keys() if n != "DATA_TYPE_UNSPECIFIED"]  # noqa: SIM118
    types: dict[str, DType] = {}
    for enum_name in names:
        name = enum_name.removeprefix("DATA_TYPE_").lower()
        held_as = "uint16" if name == "bfloat16" else name
        storage = None if name == "string" else np.dtype(held_as).newbyteorder("<")
        types[name] = DType(name, tensor_pb2.DataType.Value(enum_name), storage)
    return types


DTYPES = MappingProxyType(_table())
"""Every element type by its name."""

DTYPES_BY_NUMBER = MappingProxyType({d.number: d for d in DTYPES.values()})
"""Every element type by its number in ``modelport.v1.DataType``."""

STRING = DTYPES["string"]
BFLOAT16 = DTYPES["bfloat16"]

_BY_NUMPY = {d.storage: d for d in DTYPES.values() if d.storage is not None and d is not BFLOAT16}
"""What arrays are sent as, by what numpy calls it: its names take several times as long to ask for."""


def dtype_of(array: Array) -> DType:
    """Returns the element type that ``array`` is sent as.

    Fixed-width text and byte arrays and object arrays are sent as strings; ``ml_dtypes.bfloat16``
    as bfloat16.

    Raises:
        TensorError: for types that the wire format has not, such as complex numbers or dates.
    """
    known = _BY_NUMPY.get(array.dtype)
    if known is not None:
        return known
    if array.dtype.kind in "OSUT":
        return STRING
    dtype = DTYPES.get(array.dtype.name)
    if dtype is None:
        raise TensorError(f"arrays of {array.dtype.name} can't be sent; use one of {', '.join(DTYPES)}")
    return dtype


def element_count(shape: Sequence[int]) -> int:
    """Returns the number of elements that ``shape`` holds.

    Raises:
        TensorError: if a dimension is negative or there are more than ``MAX_RANK`` of them.
    """
    if len(shape) > MAX_RANK:
        raise TensorError(f"has {len(shape)} dimensions; at most {MAX_RANK} are allowed")
    for size in shape:
        if size < 0:
            raise TensorError(f"has the negative dimension {size}")
    return math.prod(shape)


def check_size(dtype: DType, shape: Sequence[int], byte_count: int) -> int:
    """Returns the number of elements after checking that ``byte_count`` bytes can hold them.

    Nothing is allocated, whatever the shape claims.

    Raises:
        TensorError: if the shape is not legal, or does not match the number of bytes.
    """
    count = element_count(shape)
    if not count and math.prod(size or 1 for size in shape) > _MOST_ELEMENTS:
        raise TensorError(f"has no element and the shape {_shape_text(shape)}, which is larger than any array")
    if dtype.storage is not None:
        if byte_count != count * dtype.itemsize:
            raise TensorError(
                f"{dtype.name} {_shape_text(shape)} takes {_number_text(count * dtype.itemsize)} bytes, "
                f"got {byte_count}"
            )
    elif byte_count < (count + 1) * _OFFSET.itemsize:
        raise TensorError(
            f"strings of shape {_shape_text(shape)} take at least "
            f"{_number_text((count + 1) * _OFFSET.itemsize)} bytes of offsets, got {byte_count} bytes"
        )
    return count


def string_offsets(data: bytes | memoryview, count: int) -> NDArray[np.uint32]:
    """Returns the ``count + 1`` offsets at the head of a string tensor's ``data``, checked.

    Raises:
        TensorError: if they do not start at 0, fall, or end anywhere but at the end of the data.
    """
    head = (count + 1) * _OFFSET.itemsize
    offsets: NDArray[np.uint32] = np.frombuffer(data, _OFFSET, count + 1)
    if offsets[0] != 0 or bool((offsets[1:] < offsets[:-1]).any()) or int(offsets[-1]) != len(data) - head:
        raise TensorError("has string offsets that do not start at 0, fall, or miss the end of the data")
    return offsets


def pack_strings(items: Iterable[bytes]) -> bytes:
    """Returns ``items`` in the wire format's layout for strings.

    Raises:
        TensorError: if they take more than 4 GiB together.
    """
    parts = list(items)
    ends = np.cumsum([0, *map(len, parts)], dtype=np.uint64)
    if int(ends[-1]) > np.iinfo(np.uint32).max:
        raise TensorError("the strings of one tensor take more than 4 GiB")
    return ends.astype(_OFFSET).tobytes() + b"".join(parts)


def unpack_strings(data: bytes | memoryview, count: int) -> list[bytes]:
    """Returns the ``count`` byte strings that ``data`` holds in the wire format's layout.

    Raises:
        TensorError: if the offsets are not legal.
    """
    bounds = string_offsets(data, count).tolist()
    joined = bytes(data[(count + 1) * _OFFSET.itemsize :])
    return [joined[start:end] for start, end in itertools.pairwise(bounds)]


def array_bytes(array: Array, dtype: DType) -> bytes:
    """Returns the elements of ``array`` in the wire format.

    Raises:
        TensorError: if an object array holds something that is neither text nor bytes.
    """
    if dtype.storage is None:
        return pack_strings(_as_bytes(item) for item in array.ravel().tolist())
    if dtype is not BFLOAT16 and array.dtype.byteorder == ">":
        array = array.astype(dtype.storage)
    return array.tobytes()  # C order, whatever the array's own


def array_from_bytes(dtype: DType, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """Returns the array that ``data`` holds; numbers are a read-only view onto it.

    Strings come as an object array of ``bytes``. bfloat16 comes as ``ml_dtypes.bfloat16`` where that
    package is installed, else widened to float32, which loses nothing.

    Raises:
        TensorError: if the data does not match dtype and shape.
    """
    count = check_size(dtype, shape, len(data))
    if dtype.storage is None:
        array = np.empty(count, dtype=object)
        array[:] = unpack_strings(data, count)
        return array.reshape(shape)
    flat: Array = np.frombuffer(data, dtype.storage, count)
    if dtype is BFLOAT16:
        flat = bfloat16_from_bits(flat)
    return flat.reshape(shape)


def bfloat16_from_bits(bits: NDArray[np.uint16]) -> Array:
    """Returns bfloat16 values given as uint16 bits; float32 of equal value without ``ml_dtypes``."""
    try:
        import ml_dtypes
    except ImportError:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(ml_dtypes.bfloat16)


def encode(name: str, array: Array) -> tensor_pb2.Tensor:
    """Returns ``array`` as a message.

    Raises:
        TensorError: if it has a type that the wire format has not, or too many dimensions.
    """
    message = tensor_pb2.Tensor()
    write(message, name, array)
    return message


def write(message: tensor_pb2.Tensor, name: str, array: Array) -> None:
    """Writes ``array`` into an empty message, where it has its place already: to put a message there copies it.

    Raises:
        TensorError: if it has a type that the wire format has not, or too many dimensions.
    """
    dtype = dtype_of(array)
    element_count(array.shape)
    message.data = array_bytes(array, dtype)
    message.name = name
    message.dtype = cast("tensor_pb2.DataType.ValueType", dtype.number)
    message.shape.extend(array.shape)


def decode(tensor: tensor_pb2.Tensor) -> Array:
    """Returns the array that a message holds, as ``array_from_bytes`` does.

    Raises:
        TensorError: if the message breaks the wire format; the tensor's name is not in the text.
    """
    dtype = DTYPES_BY_NUMBER.get(tensor.dtype)
    if dtype is None:
        raise TensorError(f"has the unknown data type {tensor.dtype}")
    return array_from_bytes(dtype, tuple(tensor.shape), tensor.data)


def _as_bytes(item: object) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        return item.encode()
    raise TensorError(f"object arrays may hold text and bytes alone, not {shown(type(item).__name__)}")


def _number_text(number: int) -> str:
    return str(number) if number < 10**19 else "over 10^19"


def _shape_text(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(_number_text, shape)) + "]"
