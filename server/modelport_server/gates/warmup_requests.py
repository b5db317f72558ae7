"""The warm-up requests that a SavedModel brings along, in the file that TensorFlow Serving reads them from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError

from modelport import tensors
from modelport.exceptions import ModelportError
from modelport.names import DEFAULT_SIGNATURE, shown
from modelport_server.gates import prediction_log_pb2 as pb
from modelport_server.gates._records import RecordError, records

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

WARMUP_REQUESTS = "assets.extra/tf_serving_warmup_requests"
"""Where the file lies in a SavedModel."""

MAX_REQUESTS = 1000
"""The most records of a file; TensorFlow Serving's own limit."""

MAX_BYTES = 64 << 20
"""The most bytes of a file, and of the arrays that are made from it."""

_STRING_BYTES = 8  # the reference to a string that numpy keeps

_Values = Callable[[pb.TensorProto], Sequence[Any]]

# tensorflow/core/framework/types.proto: the type's number, and the field that has its values.
_FIELDS: Mapping[int, tuple[str, _Values]] = {
    1: ("float32", lambda t: t.float_val),
    2: ("float64", lambda t: t.double_val),
    3: ("int32", lambda t: t.int_val),
    4: ("uint8", lambda t: t.int_val),
    5: ("int16", lambda t: t.int_val),
    6: ("int8", lambda t: t.int_val),
    7: ("string", lambda t: t.string_val),
    9: ("int64", lambda t: t.int64_val),
    10: ("bool", lambda t: t.bool_val),
    14: ("bfloat16", lambda t: t.half_val),
    17: ("uint16", lambda t: t.int_val),
    19: ("float16", lambda t: t.half_val),
    22: ("uint32", lambda t: t.uint32_val),
    23: ("uint64", lambda t: t.uint64_val),
}


class WarmUpRequestsError(ModelportError):
    """The file can't be used; the text says why, in one line."""


@dataclass(frozen=True, slots=True)
class WarmUpLog:
    """What a file of warm-up requests holds."""

    requests: list[tuple[str, dict[str, Array]]]
    """The signature's name and its inputs, in the file's order."""
    skipped: int
    """How many records are of other kinds than Predict."""


def read_warmup_requests(
    path: Path, *, max_requests: int = MAX_REQUESTS, max_bytes: int = MAX_BYTES
) -> list[tuple[str, dict[str, Array]]]:
    """Returns the requests of ``read_warmup_log``.

    Raises:
        WarmUpRequestsError: as that does.
    """
    return read_warmup_log(path, max_requests=max_requests, max_bytes=max_bytes).requests


def read_warmup_log(path: Path, *, max_requests: int = MAX_REQUESTS, max_bytes: int = MAX_BYTES) -> WarmUpLog:
    """Returns what a TFRecord file of PredictionLog messages holds; nothing if there is no such file.

    Strings are object arrays of ``bytes``, bfloat16 is ``ml_dtypes.bfloat16``. Arrays may be read-only.

    Args:
        path: the file.
        max_requests: the most records, those of other kinds too.
        max_bytes: the most bytes of the file, and again of the arrays together.

    Raises:
        WarmUpRequestsError: if it is damaged, too large, or holds what no caller can send.
        OSError: if the storage fails.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        return WarmUpLog([], 0)
    except (IsADirectoryError, NotADirectoryError) as exc:  # so it was published; other failures are the storage's
        raise WarmUpRequestsError(f"the warm-up requests can't be read: {exc.strerror}") from exc
    if len(data) > max_bytes:
        raise WarmUpRequestsError(f"the warm-up requests take more than {max_bytes >> 20} MiB: keep fewer of them")
    return _Reader(max_requests, max_bytes).read(data)


class _Reader:
    """Reads one file and counts what it makes of it."""

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = self._left = max_bytes

    def read(self, data: bytes) -> WarmUpLog:
        log = WarmUpLog([], 0)
        number = 1
        try:
            for number, record in enumerate(records(data), 1):
                if number > self._max_requests:
                    raise _WrongError(f"more than {self._max_requests} are not allowed")
                request = self._request(record)
                if request is not None:
                    log.requests.append(request)
                number += 1  # where the next one is damaged
        except (RecordError, DecodeError, _WrongError, tensors.TensorError) as exc:
            reason = "it is no PredictionLog" if isinstance(exc, DecodeError) else str(exc)
            raise WarmUpRequestsError(f"warm-up request {number} can't be used: {reason}") from exc
        return WarmUpLog(log.requests, number - 1 - len(log.requests))

    def _request(self, record: bytes) -> tuple[str, dict[str, Array]] | None:
        message = pb.PredictionLog.FromString(record)
        if not message.HasField("predict_log"):
            return None
        request = message.predict_log.request
        inputs = {name: self._array(name, tensor) for name, tensor in sorted(request.inputs.items())}
        return request.model_spec.signature_name or DEFAULT_SIGNATURE, inputs

    def _array(self, name: str, tensor: pb.TensorProto) -> Array:
        if tensor.dtype not in _FIELDS:
            raise _WrongError(f"input {shown(name)} has the type {tensor.dtype}, which can't be sent")
        dtype_name, field = _FIELDS[tensor.dtype]
        dtype = tensors.DTYPES[dtype_name]
        shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
        if tensor.tensor_shape.unknown_rank:
            raise _WrongError(f"input {shown(name)} has no shape")
        size = tensors.element_count(shape) * (dtype.itemsize or _STRING_BYTES)
        self._left -= size
        if self._left < 0:
            raise _WrongError(f"the arrays take more than {self._max_bytes >> 20} MiB")
        try:
            if tensor.tensor_content:
                return tensors.array_from_bytes(dtype, shape, tensor.tensor_content)
            return _from_values(dtype, shape, field(tensor))
        except tensors.TensorError as exc:
            raise _WrongError(f"input {shown(name)} {exc}") from exc


class _WrongError(Exception):
    """What a record holds is of no use."""


def _from_values(dtype: tensors.DType, shape: tuple[int, ...], values: Sequence[Any]) -> Array:
    """Returns the array of a list of values: a short one repeats its last, an empty one is all zeros."""
    count = math.prod(shape)
    if len(values) > count:
        raise tensors.TensorError(f"has {len(values)} values for a shape of {count}")
    if dtype.is_string:
        array: Array = np.full(count, values[-1] if values else b"", object)
        array[: len(values)] = list(values)
        return array.reshape(shape)
    held = np.dtype("<u2") if dtype.name == "float16" else dtype.storage  # it comes as its bits
    numbers = np.asarray(list(values)).astype(held)
    array = np.full(count, numbers[-1] if len(numbers) else 0, held)
    array[: len(numbers)] = numbers
    return tensors.array_from_bytes(dtype, shape, array.tobytes())
