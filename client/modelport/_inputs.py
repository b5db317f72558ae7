"""Turns what callers give into tensors: arrays as they are, lists by the model's signature."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from modelport import tensors
from modelport._models import SignatureInfo, TensorInfo
from modelport._options import Target
from modelport.exceptions import InputError
from modelport.names import shown
from modelport.v1 import prediction_pb2, tensor_pb2

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_PART_BYTES = 1 << 20
_ROOM_BYTES = 4096
"""What a request may hold besides tensor data: names, shapes, field headers."""

Inputs: TypeAlias = "Array | Sequence[Any] | Mapping[str, Array | Sequence[Any] | Any]"
"""What a model can be called with: the sole input's array or list, or all inputs by name."""


def needs_signature(inputs: object) -> bool:
    """Returns whether ``inputs`` can only be encoded with the model's signature at hand."""
    if isinstance(inputs, Mapping):
        return any(_is_listed(value) for value in cast("Mapping[object, object]", inputs).values())
    return True


def named_arrays(inputs: object, signature: SignatureInfo | None) -> dict[str, Array | tensor_pb2.Tensor]:
    """Returns the inputs by name; bfloat16 given as numbers comes as a message.

    Args:
        inputs: a mapping of names to arrays or lists, or the sole input's array or list.
        signature: how the model is called; may be None where ``needs_signature`` says so.

    Raises:
        InputError: if the inputs do not fit the signature.
    """
    if not isinstance(inputs, Mapping):
        inputs = {_sole_input(signature): inputs}
    given = cast("Mapping[object, object]", inputs)
    specs = {spec.name: spec for spec in signature.inputs} if signature else {}
    arrays: dict[str, Array | tensor_pb2.Tensor] = {}
    for name, value in given.items():
        if not isinstance(name, str):
            raise InputError(f"inputs go by name, and {shown(repr(name))} is no text")
        arrays[name] = _converted(name, value, specs.get(name), signature)
    return arrays


def request(arrays: Mapping[str, Array | tensor_pb2.Tensor], target: Target) -> prediction_pb2.PredictRequest:
    """Returns the message that asks for a prediction, without model, version and signature.

    Raises:
        InputError: if an array can't be sent.
    """
    message = prediction_pb2.PredictRequest()
    write(message, arrays, target)
    return message


def write(
    message: prediction_pb2.PredictRequest, arrays: Mapping[str, Array | tensor_pb2.Tensor], target: Target
) -> None:
    """Writes what ``request`` returns into an empty message, where it has its place already.

    Raises:
        InputError: if an array can't be sent.
    """
    for name, array in arrays.items():
        if isinstance(array, tensor_pb2.Tensor):
            message.inputs.append(array)
            continue
        try:
            tensors.write(message.inputs.add(), name, array)
        except tensors.TensorError as error:
            raise InputError(f"input {shown(name)}: {error}") from error
    message.outputs.extend(target.outputs)
    message.routing_key = target.routing_key


def fits(message: prediction_pb2.PredictRequest, max_bytes: int) -> bool:
    """Returns whether ``message`` is within the limit, with room for what is added to it."""
    return message.ByteSize() <= max_bytes - _ROOM_BYTES


def too_large(byte_count: int, max_bytes: int) -> InputError:
    """Returns the error for inputs over the limit that can't be sent in parts."""
    return InputError(
        f"the inputs take {byte_count:,} bytes and one message holds {max_bytes - _ROOM_BYTES:,}: "
        "send fewer rows at a time, or raise max_message_bytes here and the server's limit"
    )


def address(message: prediction_pb2.PredictRequest, target: Target, version: int | None = None) -> None:
    """Writes into ``message`` whom it is for; ``version`` takes the place of the target's choice."""
    message.model = target.model
    message.signature = target.signature
    message.ClearField("version_choice")  # an earlier try may have left one
    if version is not None or target.version is not None:
        message.version = version or target.version or 0
    elif target.alias is not None:
        message.alias = target.alias


def number_bytes(arrays: Mapping[str, Array | tensor_pb2.Tensor]) -> int:
    """Returns the bytes that the arrays of numbers take on the wire; says so without looking at elements."""
    return sum(a.nbytes for a in arrays.values() if isinstance(a, np.ndarray) and a.dtype.kind not in "OSUT")


def row_count(arrays: Mapping[str, Array]) -> int:
    """Returns the number of rows that all of ``arrays`` have.

    Raises:
        InputError: if they disagree, or one of them has no rows.
    """
    counts: dict[str, int] = {}
    for name, array in arrays.items():
        if not array.shape:
            raise InputError(f"input {shown(name)} is a single value, and the model takes rows of them")
        counts[name] = array.shape[0]
    if len(set(counts.values())) != 1:
        text = ", ".join(f"{shown(name)} has {count}" for name, count in counts.items())
        raise InputError(f"the inputs disagree on the number of rows: {text}")
    return next(iter(counts.values()))


def answer_row_bytes(signature: SignatureInfo, wanted: Sequence[str]) -> int:
    """Returns the bytes that a row's answer takes, as far as the signature says so."""
    return sum(_row_bytes(spec) for spec in signature.outputs if not wanted or spec.name in wanted)


def parts(arrays: Mapping[str, Array], max_bytes: int, answer_bytes: int = 0) -> Iterator[dict[str, Array]]:
    """Yields ``arrays`` in slices of rows that fit into a message, as their answers do; views, not copies.

    Args:
        arrays: the inputs.
        max_bytes: the largest message.
        answer_bytes: the bytes that the answer to a row takes.

    Raises:
        InputError: if one row alone does not fit, or the arrays disagree on the number of rows.
    """
    rows = row_count(arrays)
    limit = max_bytes - 2 * _ROOM_BYTES
    wanted = min(limit, _PART_BYTES)
    step = max(1, rows * wanted // max(1, sum(map(_wire_bytes, arrays.values())), rows * answer_bytes))
    start = 0
    while start < rows:
        size = step
        part = {name: array[start : start + size] for name, array in arrays.items()}
        while size > 1 and sum(map(_wire_bytes, part.values())) > limit:  # strings: rows differ in size
            size //= 2
            part = {name: array[start : start + size] for name, array in arrays.items()}
        yield part
        start += size


def _row_bytes(spec: TensorInfo) -> int:
    dtype = tensors.DTYPES.get(spec.dtype)
    if dtype is None or not spec.shape:
        return 0
    return math.prod(size or 1 for size in spec.shape[1:]) * dtype.itemsize


def _wire_bytes(array: Array) -> int:
    if array.dtype.kind in "OSUT":
        return sum(4 + len(item) * (4 if isinstance(item, str) else 1) for item in array.ravel().tolist()) + 4
    return array.nbytes


def _is_listed(value: object) -> bool:
    return isinstance(value, (list, tuple, bool, int, float, str, bytes))


def _sole_input(signature: SignatureInfo | None) -> str:
    if signature is None:
        raise InputError("a single array needs the model's signature to know its input")
    if len(signature.inputs) != 1:
        names = ", ".join(spec.name for spec in signature.inputs) or "none"
        raise InputError(
            f"signature {signature.name} has {len(signature.inputs)} inputs ({names}): give a dict of arrays by name"
        )
    return signature.inputs[0].name


def _converted(
    name: str, value: object, spec: TensorInfo | None, signature: SignatureInfo | None
) -> Array | tensor_pb2.Tensor:
    if not _is_listed(value):
        return np.asarray(value)
    kinds = set(_kinds(value))
    if any(issubclass(kind, (np.ndarray, np.generic)) for kind in kinds):
        return _as_array(name, value)  # it has a dtype of its own, which is never changed
    if spec is None:
        names = ", ".join(s.name for s in signature.inputs) if signature else ""
        raise InputError(f"there is no input {shown(name)}; the signature has {names}")
    if spec.dtype == "string":
        return _strings(name, value, kinds)
    return _numbers(name, value, kinds, spec.dtype)


def _kinds(value: object) -> Iterator[type]:
    if isinstance(value, (list, tuple)):
        for item in cast("Sequence[object]", value):
            yield from _kinds(item)
    else:
        yield type(value)


def _as_array(name: str, value: object, dtype: Any = None) -> Array:
    try:
        return np.asarray(value, dtype=dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"input {shown(name)}: the list makes no array, its rows differ in length or type") from error


def _strings(name: str, value: object, kinds: Iterable[type]) -> Array:
    if wrong := [kind.__name__ for kind in kinds if not issubclass(kind, (str, bytes))]:
        raise InputError(f"input {shown(name)} takes text or bytes, not {wrong[0]}")
    array = np.asarray(value, dtype=object)
    if any(isinstance(item, (list, tuple)) for item in array.ravel().tolist()):
        raise InputError(f"input {shown(name)}: the list's rows differ in length")
    return array


def _numbers(name: str, value: object, kinds: set[type], dtype: str) -> Array | tensor_pb2.Tensor:
    _check_kinds(name, kinds, dtype)
    if dtype == "bool":
        return _as_array(name, value, np.bool_)
    if dtype == "bfloat16":
        return _bfloat16(name, _as_array(name, value, np.float64))
    target = np.dtype(dtype)
    if target.kind == "f":
        return _floats(name, _as_array(name, value, np.float64), target)
    array = _as_array(name, value) if kinds else np.asarray(value, dtype=target)
    return _integers(name, array, target)


def _check_kinds(name: str, kinds: set[type], dtype: str) -> None:
    if dtype == "bool":
        allowed: tuple[type, ...] = (bool,)
    elif "float" in dtype:
        allowed = (int, float)
    else:
        allowed = (int,)
    for kind in kinds:
        if not issubclass(kind, allowed) or (kind is bool and dtype != "bool"):
            raise InputError(f"input {shown(name)} takes {dtype}, and the list holds {shown(kind.__name__)}")


def _integers(name: str, array: Array, target: np.dtype[Any]) -> Array:
    limits = np.iinfo(target)
    if array.size:
        low, high = array.min(), array.max()
        if int(low) < limits.min or int(high) > limits.max or array.dtype.kind not in "iuO":
            wrong = low if int(low) < limits.min else high
            raise InputError(
                f"input {shown(name)} takes {target.name}, {limits.min} to {limits.max}; {wrong} does not fit"
            )
    return array.astype(target)


def _floats(name: str, array: Array, target: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        narrow = array.astype(target)
    _check_overflow(name, array, narrow, target.name)
    return narrow


def _check_overflow(name: str, array: Array, narrow: Array, dtype: str) -> None:
    lost = np.isfinite(array) & ~np.isfinite(narrow)
    if bool(lost.any()):
        raise InputError(f"input {shown(name)} takes {dtype}; {array[lost].flat[0]} does not fit")


def _bfloat16(name: str, array: Array) -> tensor_pb2.Tensor:
    """Rounds to the nearest bfloat16, ties to even, without any package that has the type."""
    wide = np.ascontiguousarray(_floats(name, array, np.dtype(np.float32)))
    bits = wide.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    rounded[np.isnan(wide)] = 0x7FC0
    narrow = (rounded.astype(np.uint32) << 16).view(np.float32)
    _check_overflow(name, wide, narrow, "bfloat16")
    return tensor_pb2.Tensor(
        name=name,
        dtype=tensor_pb2.DATA_TYPE_BFLOAT16,
        shape=array.shape,
        data=rounded.tobytes(),
    )
