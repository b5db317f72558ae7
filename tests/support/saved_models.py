"""SavedModels for tests: real ones made with TensorFlow, and fakes that only look like one.

TensorFlow is imported by the functions that need it, so that the others stay fast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelport_registry import saved_model_pb2 as pb

Shape = Sequence[int | None] | None
Tensors = Mapping[str, tuple[str, Shape]]
"""Type name and shape by tensor name."""

SERVING_DEFAULT = "serving_default"

_NUMBERS = {
    "float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "string": 7, "complex64": 8,
    "int64": 9, "bool": 10, "bfloat16": 14, "uint16": 17, "float16": 19, "resource": 20, "uint32": 22,
    "uint64": 23,
}  # fmt: skip

ROW_DOUBLER: Mapping[str, tuple[Tensors, Tensors]] = {
    SERVING_DEFAULT: ({"x": ("float32", [None, 4])}, {"y": ("float32", [None, 4])}),
}
"""The signature of ``write_versioned_model``, less its version."""


def saved_model_bytes(
    signatures: Mapping[str, tuple[Tensors, Tensors]] = ROW_DOUBLER, *, tags: Sequence[str] = ("serve",)
) -> bytes:
    """Returns a ``saved_model.pb`` that has signatures, given as (inputs, outputs), and no graph."""
    message = pb.SavedModel(schema_version=1)
    graph = message.meta_graphs.add()
    graph.meta_info.tags.extend(tags)
    graph.meta_info.tensorflow_version = "2.21.0"
    for name, (inputs, outputs) in signatures.items():
        signature = graph.signature_def[name]
        signature.method_name = "tensorflow/serving/predict"
        for infos, tensors in ((signature.inputs, inputs), (signature.outputs, outputs)):
            for tensor, (dtype, shape) in tensors.items():
                _fill(infos[tensor], tensor, dtype, shape)
    return message.SerializeToString(deterministic=True)


def write_fake_saved_model(
    path: Path,
    signatures: Mapping[str, tuple[Tensors, Tensors]] = ROW_DOUBLER,
    *,
    variables: bytes = b"not really variables",
) -> Path:
    """Writes a folder that looks like a SavedModel; the registry takes it, TensorFlow would not."""
    (path / "variables").mkdir(parents=True)
    (path / "saved_model.pb").write_bytes(saved_model_bytes(signatures))
    (path / "variables" / "variables.data-00000-of-00001").write_bytes(variables)
    (path / "variables" / "variables.index").write_bytes(b"index")
    return path


def write_versioned_model(path: Path, tag: int) -> Path:
    """Writes a model that says which it is: x float32 [n, 4] to y = 2x and version int64 [n] = ``tag``."""
    tf = _tensorflow()

    def double(x: Any) -> dict[str, Any]:
        version = tf.fill([tf.shape(x)[0]], tf.constant(tag, tf.int64))
        return {"y": x * 2.0, "version": version}

    return _save(path, {SERVING_DEFAULT: (double, [("float32", [None, 4], "x")])})


def write_dense_model(path: Path) -> Path:
    """Writes a model of two dense layers, x float32 [n, 64] to y float32 [n, 8]; ``double`` doubles x."""
    tf = _tensorflow()
    random = np.random.default_rng(3)
    weights = [tf.constant(random.standard_normal(shape) / 8, tf.float32) for shape in ((64, 64), (64, 8))]

    def dense(x: Any) -> dict[str, Any]:
        return {"y": tf.nn.relu(x @ weights[0]) @ weights[1]}

    def double(x: Any) -> dict[str, Any]:
        return {"y": x + x}

    given: list[tuple[str, Shape, str]] = [("float32", [None, 64], "x")]
    return _save(path, {SERVING_DEFAULT: (dense, given), "double": (double, given)})


def write_zoo(folder: Path) -> dict[str, Path]:
    """Writes one model of every odd kind into ``folder``, and returns their folders by name.

    ``two_inputs``  a float32 [n, 3], b int32 [n]; sum float32 [n, 3], product int32 [n]
    ``strings``     text string [n]; upper string [n], doubled string [n], length int32 [n]
    ``no_batch``    matrix float32 [3, 3]; determinant float32 []
    ``signatures``  serving_default, double and triple: x float32 [n]; y float32 [n]
    ``many``        x float32 [n]; out_00 ... out_49 float32 [n], x plus the number
    ``bfloat16``    x bfloat16 [n, 2]; y bfloat16 [n, 2] doubled, wide float32 [n, 2]
    ``scalars``     a float32 [], b int64 []; sum float32 [], power float32 []
    ``bad_rows``    x float32 [n], which must not be negative; y float32 [n], the square root
    ``batch_mates`` x float32 [n]; y float32 [n], less the mean of all rows that ran together
    """
    return {name: _save(folder / name, signatures()) for name, signatures in _ZOO.items()}


Signature = tuple[Callable[..., Any], list[tuple[str, Shape, str]]]


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    return tf


def _save(path: Path, signatures: Mapping[str, Signature]) -> Path:
    tf = _tensorflow()
    functions = {
        name: tf.function(
            function,
            input_signature=[tf.TensorSpec(shape, dtype, name=arg) for dtype, shape, arg in specs],
        )
        for name, (function, specs) in signatures.items()
    }
    concrete = {name: function.get_concrete_function() for name, function in functions.items()}
    tf.saved_model.save(tf.Module(), str(path), signatures=concrete)
    return path


def _two_inputs() -> dict[str, Signature]:
    tf = _tensorflow()

    def run(a: Any, b: Any) -> dict[str, Any]:
        return {"sum": a + tf.cast(b, tf.float32)[:, None], "product": tf.cast(a[:, 0], tf.int32) * b}

    return {SERVING_DEFAULT: (run, [("float32", [None, 3], "a"), ("int32", [None], "b")])}


def _strings() -> dict[str, Signature]:
    tf = _tensorflow()

    def run(text: Any) -> dict[str, Any]:
        return {
            "upper": tf.strings.upper(text),
            "doubled": tf.strings.join([text, text]),
            "length": tf.strings.length(text),
        }

    return {SERVING_DEFAULT: (run, [("string", [None], "text")])}


def _no_batch() -> dict[str, Signature]:
    tf = _tensorflow()

    def run(matrix: Any) -> dict[str, Any]:
        return {"determinant": tf.linalg.det(matrix)}

    return {SERVING_DEFAULT: (run, [("float32", [3, 3], "matrix")])}


def _signatures() -> dict[str, Signature]:
    def times(factor: float) -> Signature:
        def run(x: Any) -> dict[str, Any]:
            return {"y": x * factor}

        return run, [("float32", [None], "x")]

    return {SERVING_DEFAULT: times(1.5), "double": times(2.0), "triple": times(3.0)}


def _many() -> dict[str, Signature]:
    def run(x: Any) -> dict[str, Any]:
        return {f"out_{number:02}": x + float(number) for number in range(50)}

    return {SERVING_DEFAULT: (run, [("float32", [None], "x")])}


def _bfloat16() -> dict[str, Signature]:
    tf = _tensorflow()

    def run(x: Any) -> dict[str, Any]:
        return {"y": x + x, "wide": tf.cast(x, tf.float32)}

    return {SERVING_DEFAULT: (run, [("bfloat16", [None, 2], "x")])}


def _scalars() -> dict[str, Signature]:
    tf = _tensorflow()

    def run(a: Any, b: Any) -> dict[str, Any]:
        return {"sum": a + tf.cast(b, tf.float32), "power": tf.pow(a, tf.cast(b, tf.float32))}

    return {SERVING_DEFAULT: (run, [("float32", [], "a"), ("int64", [], "b")])}


def _bad_rows() -> dict[str, Signature]:
    tf = _tensorflow()

    def run(x: Any) -> dict[str, Any]:
        with tf.control_dependencies([tf.debugging.assert_non_negative(x, message="x is negative")]):
            return {"y": tf.sqrt(x)}

    return {SERVING_DEFAULT: (run, [("float32", [None], "x")])}


def _batch_mates() -> dict[str, Signature]:
    tf = _tensorflow()

    def run(x: Any) -> dict[str, Any]:
        return {"y": x - tf.reduce_mean(x, axis=0)}

    return {SERVING_DEFAULT: (run, [("float32", [None], "x")])}


_ZOO: Mapping[str, Callable[[], dict[str, Signature]]] = {
    "two_inputs": _two_inputs,
    "strings": _strings,
    "no_batch": _no_batch,
    "signatures": _signatures,
    "many": _many,
    "bfloat16": _bfloat16,
    "scalars": _scalars,
    "bad_rows": _bad_rows,
    "batch_mates": _batch_mates,
}


def _fill(info: pb.TensorInfo, name: str, dtype: str, shape: Shape) -> None:
    info.name = f"{name}:0"
    info.dtype = _NUMBERS[dtype]
    info.tensor_shape.SetInParent()
    if shape is None:
        info.tensor_shape.unknown_rank = True
        return
    for size in shape:
        info.tensor_shape.dim.add(size=-1 if size is None else size)
