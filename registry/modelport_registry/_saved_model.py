"""Reads the signatures of a ``saved_model.pb`` without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from modelport.names import shown
from modelport_registry import saved_model_pb2 as pb
from modelport_registry._errors import InvalidModelError
from modelport_registry._manifest import SignatureSpec, TensorSpec

MAX_SAVED_MODEL_BYTES = 2**31 - 1
"""protobuf's own limit for one message."""

_SERVE = "serve"
_INTERNAL = "__saved_model_init_op"

# tensorflow/core/framework/types.proto; those that modelport.tensors has keep its names.
_DTYPES = {
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 7: "string",
    8: "complex64", 9: "int64", 10: "bool", 11: "qint8", 12: "quint8", 13: "qint32", 14: "bfloat16",
    15: "qint16", 16: "quint16", 17: "uint16", 18: "complex128", 19: "float16", 20: "resource",
    21: "variant", 22: "uint32", 23: "uint64", 24: "float8_e5m2", 25: "float8_e4m3fn",
    29: "int4", 30: "uint4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SavedModelInfo:
    """What modelport wants to know of a SavedModel."""

    signatures: Mapping[str, SignatureSpec]
    """By name; at least one."""
    framework: Mapping[str, str]
    """The TensorFlow that wrote it, if it says so."""


def read_saved_model(data: bytes) -> SavedModelInfo:
    """Returns what the bytes of a ``saved_model.pb`` say about the graph tagged ``serve``.

    Raises:
        InvalidModelError: if they are no SavedModel, or have no such graph or no signature.
    """
    graph = _serving_graph(_parse(data))
    signatures = {
        name: SignatureSpec(name, _tensors(signature.inputs), _tensors(signature.outputs))
        for name, signature in sorted(graph.signature_def.items())
        if not name.startswith(_INTERNAL)
    }
    if not signatures:
        raise InvalidModelError("the SavedModel has no signatures: export it with signatures=...")
    tensorflow = graph.meta_info.tensorflow_version
    return SavedModelInfo(signatures, {"tensorflow": tensorflow} if tensorflow else {})


def with_signature(data: bytes, name: str, rename: str) -> bytes:
    """Returns the bytes of a ``saved_model.pb`` with one signature alone, under another name.

    Raises:
        InvalidModelError: if they are no SavedModel, or have no such signature.
    """
    message = _parse(data)
    signatures = _serving_graph(message).signature_def
    if name not in signatures:
        raise InvalidModelError(f"the SavedModel has no signature {shown(name)}")
    kept = pb.SignatureDef()
    kept.CopyFrom(signatures[name])
    for other in list(signatures):
        del signatures[other]
    signatures[rename].CopyFrom(kept)
    return message.SerializeToString()


def _parse(data: bytes) -> pb.SavedModel:
    try:
        return pb.SavedModel.FromString(data)
    except DecodeError as exc:
        raise InvalidModelError("saved_model.pb is damaged or not a SavedModel: export the model again") from exc


def _serving_graph(message: pb.SavedModel) -> pb.MetaGraph:
    for graph in message.meta_graphs:
        if set(graph.meta_info.tags) == {_SERVE}:
            return graph
    found = ", ".join(shown("+".join(graph.meta_info.tags)) for graph in message.meta_graphs[:5])
    raise InvalidModelError(
        f"the SavedModel has no graph tagged {_SERVE!r} (it has: {found or 'no graph at all'}): export it for serving"
    )


def _tensors(infos: Mapping[str, pb.TensorInfo]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, _dtype(info), _shape(info)) for name, info in sorted(infos.items()))


def _dtype(info: pb.TensorInfo) -> str:
    if not info.name:
        return "composite"  # a sparse or ragged tensor, which has several names instead of one
    return _DTYPES.get(info.dtype, f"type-{info.dtype}")


def _shape(info: pb.TensorInfo) -> tuple[int | None, ...] | None:
    shape = info.tensor_shape
    if shape.unknown_rank:
        return None
    return tuple(dim.size if dim.size >= 0 else None for dim in shape.dim)
