"""SavedModels whose graphs the gates look into: of every kind that people export, and bad ones.

Run as ``python -m tests.support.graph_models FOLDER``: TensorFlow is slow to import, and writes each model
into its own folder. What can be made without TensorFlow, from the bytes of a good model, tests make themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    return tf


def _export(path: Path, function: Callable[..., Any], *, keep: Any = None) -> None:
    tf = _tensorflow()
    module = tf.Module()
    module.keep = keep
    traced = tf.function(function, input_signature=[tf.TensorSpec([None, 4], "float32", name="x")])
    tf.saved_model.save(module, str(path), signatures=traced.get_concrete_function())


def _keras(path: Path) -> None:
    """Layers of every kind, exported as Keras does it, with preprocessing and a lookup table."""
    keras = _tensorflow().keras
    image = keras.Input((16, 16, 3), name="image")
    words = keras.Input((6,), dtype="int32", name="words")
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.RandomFlip()(x)
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    x = keras.layers.DepthwiseConv2D(3)(x)
    x = keras.layers.Conv2DTranspose(4, 2, strides=2)(x)
    x = keras.layers.UpSampling2D(interpolation="bilinear")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Dropout(0.3)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    y = keras.layers.Embedding(50, 8)(words)
    y = keras.layers.MultiHeadAttention(2, 4)(y, y)
    y = keras.layers.LayerNormalization()(y)
    y = keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True))(y)
    y = keras.layers.GRU(4)(y)
    z = keras.layers.Concatenate()([x, y])
    model = keras.Model([image, words], keras.layers.Dense(5, activation="softmax")(z))
    model.export(str(path), verbose=False)


def _keras_trained(path: Path) -> None:
    """A model that has been compiled and trained, saved with its optimizer's variables."""
    tf = _tensorflow()
    model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(3)])
    model.compile(optimizer="adam", loss="mse")
    model.fit(tf.ones([8, 4]), tf.ones([8, 3]), verbose=0)
    tf.saved_model.save(model, str(path))


def _tables(path: Path) -> None:
    """A lookup table that is filled from memory, a loop, a condition, an image decoder and an assertion."""
    tf = _tensorflow()
    initial = tf.lookup.KeyValueTensorInitializer(["1.0", "2.0"], [1.0, 2.0])
    table = tf.lookup.StaticHashTable(initial, 0.0)

    def below_three(*state: Any) -> Any:
        return state[0] < 3

    def add(*state: Any) -> Any:
        return state[0] + 1, state[1] + table.lookup(tf.strings.as_string(state[1]))

    def run(x: Any) -> dict[str, Any]:
        tf.debugging.assert_all_finite(x, "x is not finite")
        total = tf.while_loop(below_three, add, [0, x])[1]
        pixels = tf.io.decode_image(tf.io.encode_png(tf.zeros([2, 2, 3], tf.uint8)))
        return {"y": tf.cond(tf.reduce_sum(x) > 0, lambda: total, lambda: x) + tf.cast(pixels[0, 0, 0], tf.float32)}

    _export(path, run, keep=table)


def _read_file(path: Path) -> None:
    """``ReadFile`` in a function that is called by a function that the signature calls."""
    tf = _tensorflow()

    def inner(x: Any) -> Any:
        return x + tf.cast(tf.strings.length(tf.io.read_file("/etc/hostname")), tf.float32)

    def outer(x: Any) -> Any:
        return tf.map_fn(tf.function(inner), x)

    def run(x: Any) -> dict[str, Any]:
        return {"y": tf.function(outer)(x)}

    _export(path, run)


def _python(path: Path) -> None:
    tf = _tensorflow()

    def in_python(x: Any) -> Any:
        return x * 2

    def double(x: Any) -> dict[str, Any]:
        return {"y": tf.ensure_shape(tf.py_function(in_python, [x], tf.float32), [None, 4])}

    _export(path, double)


def _saves(path: Path) -> None:
    """``SaveV2`` that runs with every call of the signature."""
    tf = _tensorflow()

    def run(x: Any) -> dict[str, Any]:
        saved = tf.raw_ops.SaveV2(prefix="/nowhere/stolen", tensor_names=["x"], shape_and_slices=[""], tensors=[x])
        with tf.control_dependencies([saved]):
            return {"y": tf.identity(x)}

    _export(path, run)


def _tf1(path: Path, *, restore_writes: bool = False, init_writes: bool = False) -> None:
    """A TensorFlow 1 graph with two savers; bad ones save where they restore, or where they initialize."""
    tf = _tensorflow()
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder("float32", [None, 4], name="x")
        weights = v1.get_variable("weights", [4, 4], use_resource=False)
        y = tf.matmul(x, weights, name="y")
        v1.train.Saver()
        saver = v1.train.Saver(sharded=True)
        session.run(v1.global_variables_initializer())
        write = tf.raw_ops.SaveV2(prefix="/nowhere/w", tensor_names=["x"], shape_and_slices=[""], tensors=[weights])
        if restore_writes:
            restore = session.graph.get_operation_by_name(saver.saver_def.restore_op_name)
            restore._add_control_input(write)
        builder = v1.saved_model.builder.SavedModelBuilder(str(path))
        signature = v1.saved_model.signature_def_utils.predict_signature_def({"x": x}, {"y": y})
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            {"serving_default": signature},
            saver=saver,
            main_op=write if init_writes else None,
            clear_devices=True,
        )
        builder.save()


def _tf1_good(path: Path) -> None:
    tf = _tensorflow()
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder("float32", [None, 4], name="x")
        y = tf.matmul(x, v1.get_variable("weights", [4, 4], use_resource=False), name="y")
        v1.train.Saver()
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, str(path), {"x": x}, {"y": y})


MODELS: dict[str, Callable[[Path], None]] = {
    "keras": _keras,
    "keras-trained": _keras_trained,
    "tables": _tables,
    "tf1": _tf1_good,
    "bad-read-file": _read_file,
    "bad-python": _python,
    "bad-saves": _saves,
    "bad-tf1-restore": lambda path: _tf1(path, restore_writes=True),
    "bad-tf1-init": lambda path: _tf1(path, init_writes=True),
}
"""The makers by name; those of bad models begin with ``bad-``."""


def main() -> None:
    """Writes every model into the folder that the first argument names."""
    for name, make in MODELS.items():
        make(Path(sys.argv[1]) / name)


if __name__ == "__main__":
    main()
