"""Warm-up requests as TensorFlow writes them.

Run as ``python -m tests.support.warmup_files FILE``: TensorFlow makes the tensors and the TFRecord file.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: TID253 - the requests use bfloat16
import numpy as np

from modelport_server.gates import prediction_log_pb2 as pb
from modelport_server.gates._records import crc32c

NUMBERS = [
    "float32", "float64", "int32", "uint8", "int16", "int8", "int64", "bool", "uint16", "float16", "uint32", "uint64",
]  # fmt: skip

ARRAYS: dict[str, Any] = {name: (np.arange(6).reshape(2, 3) * 41 - 7).astype(name) for name in NUMBERS}
ARRAYS["bfloat16"] = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
ARRAYS["string"] = np.array([[b"", b"ab"], [b"\xff\x00", b"x" * 300]], dtype=object)
ARRAYS["scalar"] = np.array(2.5, np.float32)
ARRAYS["equal"] = np.full((3, 2), 7, np.int64)
ARRAYS["equal-half"] = np.full((3, 2), -1.5, np.float16)
ARRAYS["large"] = np.random.default_rng(1).standard_normal((64, 28, 28)).astype(np.float32)


def log_of(inputs: dict[str, pb.TensorProto], signature: str = "") -> bytes:
    """Returns a record that holds one request."""
    message = pb.PredictionLog()
    message.predict_log.request.model_spec.signature_name = signature
    for name, tensor in inputs.items():
        message.predict_log.request.inputs[name].CopyFrom(tensor)
    return message.SerializeToString()


def framed(*bodies: bytes) -> bytes:
    """Returns a TFRecord file that holds ``bodies``, made without TensorFlow."""

    def masked(data: bytes) -> bytes:
        crc = crc32c(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    heads = (struct.pack("<Q", len(body)) for body in bodies)
    return b"".join(head + masked(head) + body + masked(body) for head, body in zip(heads, bodies, strict=True))


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    return tf


def write_records(path: Path, records: list[bytes]) -> None:
    """Writes a TFRecord file with TensorFlow."""
    tf = _tensorflow()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)


def main() -> None:
    """Writes one request with tensors of every type, as content and as values, and records of other kinds."""
    tf = _tensorflow()
    inputs = {
        name: pb.TensorProto.FromString(tf.make_tensor_proto(array).SerializeToString())
        for name, array in ARRAYS.items()
    }
    short = pb.TensorProto(dtype=1, float_val=[1.0, 2.0])
    short.tensor_shape.dim.add(size=5)
    unset = pb.TensorProto(dtype=3)
    unset.tensor_shape.dim.add(size=2)
    words = pb.TensorProto(dtype=7, string_val=[b"a", b"b"])
    words.tensor_shape.dim.add(size=4)
    classify = b"\x12\x00"  # field 2, an empty message
    records = [log_of(inputs), classify, log_of({"short": short, "unset": unset, "words": words}, "other")]
    write_records(Path(sys.argv[1]), records)


if __name__ == "__main__":
    main()
