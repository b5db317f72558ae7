"""Requests and answers between their wire form and the server's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError, Message

from modelport.names import shown
from modelport.tensors import DTYPES_BY_NUMBER, TensorError, check_size
from modelport.v1 import prediction_pb2, tensor_pb2
from modelport_server.batching.calls import Answer
from modelport_server.errors import InvalidCallError, TooLargeError
from modelport_server.tensors import RawTensor, checked_strings


class Request(NamedTuple):
    """A decoded ``PredictRequest`` whose tensors are legal in themselves."""

    model: str
    version: int | None
    alias: str | None
    signature: str
    inputs: tuple[RawTensor, ...]
    outputs: tuple[str, ...]
    sequence: int
    size: int
    """The bytes of the message."""
    routing_key: str = ""


def parse_predict(raw: bytes) -> prediction_pb2.PredictRequest:
    """Parses a message.

    Raises:
        InvalidCallError: if it is not one.
    """
    try:
        return prediction_pb2.PredictRequest.FromString(raw)
    except DecodeError:
        raise InvalidCallError("the message is not a modelport.v1.PredictRequest") from None


def parse_stream(raw: bytes) -> prediction_pb2.PredictStreamRequest:
    """Parses a stream's message.

    Raises:
        InvalidCallError: if it is not one.
    """
    try:
        return prediction_pb2.PredictStreamRequest.FromString(raw)
    except DecodeError:
        raise InvalidCallError("the message is not a modelport.v1.PredictStreamRequest") from None


def to_request(message: prediction_pb2.PredictRequest, size: int) -> Request:
    """Returns the request that a message holds.

    Raises:
        InvalidCallError: if one of its tensors is not legal.
    """
    choice = message.WhichOneof("version_choice")
    return Request(
        model=message.model,
        version=message.version if choice == "version" else None,
        alias=message.alias if choice == "alias" else None,
        signature=message.signature,
        inputs=tuple([_to_tensor(tensor) for tensor in message.inputs]),
        outputs=tuple(message.outputs),
        sequence=message.sequence,
        size=size,
        routing_key=message.routing_key,
    )


def _to_tensor(message: tensor_pb2.Tensor) -> RawTensor:
    dtype = DTYPES_BY_NUMBER.get(message.dtype)
    if dtype is None:
        raise InvalidCallError(f"input {shown(message.name)} has the unknown data type {message.dtype}")
    data = message.data
    shape = tuple(message.shape)
    try:
        check_size(dtype, shape, len(data))
        return checked_strings(RawTensor(message.name, dtype, shape, data))
    except TensorError as error:
        raise InvalidCallError(f"input {shown(message.name)}: {error}") from None


def to_response(model: str, answer: Answer, outputs: Sequence[str], sequence: int) -> prediction_pb2.PredictResponse:
    """Returns the message for an answer, with the outputs named alone, or with all if none is named."""
    return prediction_pb2.PredictResponse(
        model=model,
        version=answer.version,
        outputs=[_to_message(tensor) for tensor in answer.outputs if not outputs or tensor.name in outputs],
        sequence=sequence,
        queue_time_us=answer.queue_time_us,
        engine_time_us=answer.engine_time_us,
    )


def packed(message: Message, max_bytes: int) -> bytes:
    """Returns ``message`` as bytes.

    Raises:
        TooLargeError: if it is larger than a message may be; gRPC would end the stream for it.
    """
    size = message.ByteSize()
    if size > max_bytes:
        raise too_large(size, max_bytes)
    return message.SerializeToString()


def too_large(size: int, max_bytes: int) -> TooLargeError:
    """Returns the error for an answer of so many bytes."""
    return TooLargeError(
        f"the answer of {size} bytes is larger than a message may be, {max_bytes} bytes: "
        "send fewer rows, or name the outputs that are wanted"
    )


def _to_message(tensor: RawTensor) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(
        name=tensor.name,
        dtype=tensor.dtype.number,  # type: ignore[arg-type]
        shape=tensor.shape,
        data=bytes(tensor.data),
    )
