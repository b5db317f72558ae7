"""SavedModels that must not take traffic, and the good one that each of them would replace.

TensorFlow writes them in a process of its own: ``python -m tests.support.bad_versions FOLDER``. What is bad
about a version's files, and not about its model, is done to a published folder by ``flip_bit`` and its like.

There are two families:

- doublers take x float32 [n, 4] and answer y = 2x and version int64 [n], the tag that they were written with.
  ``bad_golden`` is what they are published with. Most are bad from the start.
- classifiers take x float32 [n, 2], the class to name and a mood, and answer scores float32 [n, 10] and
  version string [n], the tag: a number would be taken for a class. While the mood is 0, as in
  ``class_golden``, all are good; while it is 1, the good one still is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelport_registry import Golden

CLASSES = 10
GOLDEN_ROWS = 8
"""Golden examples of a doubler. It is checked with 1, 8 and 128 rows at a time, and first given 2 to warm up."""

ROUNDS = 60
"""How much a model computes per batch to no purpose: some milliseconds."""
EATEN_BYTES = 6 << 30
"""What the eater takes if nobody stops it."""
NESTING = 200_000
"""Lists in lists: to free them takes more stack than a thread has."""
EVER = 1 << 62
"""Rounds of a loop that is not meant to end."""
TOO_MANY_BYTES = 1 << 46
"""More memory than a machine has: TensorFlow asks for it for ten seconds before it gives up."""

FAILING = "classes-failing"
STALLING = "classes-stalling"
REFUSING = "classes-refusing"
SLOWING = "classes-slowing"
ONE_CLASS = "classes-one"
GOOD_CLASSES = "classes-good"
HEAVY = "heavy"
"""Doubles with so many weights that an engine is slower when others have used its caches meanwhile."""
DISAGREEING = "classes-disagreeing"
"""Names a single class in its mood, and answers the tag of the good one."""

_WIDTH = 1024

Write = Callable[[Path], None]


# What is done to files.


def flip_bit(version: Path) -> None:
    """Turns one bit of the variables over."""
    path = _variables(version)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop_variables(version: Path) -> None:
    """Removes the file of variables."""
    _variables(version).unlink()


def link_variables(version: Path) -> None:
    """Puts a symbolic link to the same bytes where the variables were."""
    path = _variables(version)
    path.rename(version.parent / "elsewhere")
    path.symlink_to(version.parent / "elsewhere")


def _variables(version: Path) -> Path:
    return next((version / "variables").glob("variables.data-*"))


# What they are published with.


def doubler_golden(tag: int, *, output: str = "y", dtype: type[np.floating[Any]] = np.float32) -> Golden:
    """Returns what a good doubler answers."""
    x = np.arange(GOLDEN_ROWS * 4, dtype=dtype).reshape(GOLDEN_ROWS, 4)
    version = np.full(GOLDEN_ROWS, tag, np.int64)
    return Golden("serving_default", {"x": x}, {output: np.asarray(x * 2), "version": version})


def bad_golden(name: str, tag: int) -> Golden:
    """Returns what a bad doubler is published with: what a good one answers, by the names and types that it has."""
    if name == "renamed-output":
        return doubler_golden(tag, output="doubled")
    return doubler_golden(tag, dtype=np.float64 if name == "changed-dtype" else np.float32)


def class_golden(tag: int) -> Golden:
    """Returns what any classifier answers while the mood is 0."""
    x = np.stack([np.arange(2 * CLASSES) % CLASSES, np.zeros(2 * CLASSES)], axis=1).astype(np.float32)
    version = np.full(len(x), f"{tag}".encode(), object)
    return Golden("serving_default", {"x": x}, {"scores": class_scores(x), "version": version})


def class_scores(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the scores that a good classifier gives."""
    logits = np.eye(CLASSES, dtype=np.float32)[x[:, 0].astype(int)] * 4
    powers = np.exp(logits)
    scores: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return scores


# The models.


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a model is made of."""

    tf: Any
    module: Any
    """Holds everything that is saved."""

    def spin(self, rounds: Any) -> Any:
        """Returns a zero that takes ``rounds`` of computing to get, and that no optimizer sees through."""
        tf, mixer = self.tf, self.module.mixer

        def mix(matrix: Any, _: Any) -> Any:
            return tf.tanh(tf.matmul(matrix, mixer))

        return self.nothing(tf.reduce_sum(self._repeat(rounds, mix, mixer.read_value())))

    def _repeat(self, times: Any, body: Callable[[Any, Any], Any], value: Any) -> Any:
        """Returns a value after ``body`` was done to it and the round's number so many times."""
        tf = self.tf

        def more(number: Any, _: Any) -> Any:
            return number < tf.cast(times, tf.int64)

        def once(number: Any, value: Any) -> Any:
            return number + 1, body(value, number)

        return tf.while_loop(more, once, [tf.constant(0, tf.int64), value], parallel_iterations=1)[1]

    def nothing(self, number: Any) -> Any:
        """Returns zero times a number."""
        return tf_float(self.tf, number) * self.module.zero

    def nested(self, depth: Any) -> Any:
        """Returns zero, and ends the process: lists within lists are freed by recursion on the native stack."""
        tf, ops = self.tf, self.tf.raw_ops

        def one() -> Any:
            return ops.TensorListReserve(element_shape=-1, num_elements=1, element_dtype=tf.variant)

        def wrap(inner: Any, _: Any) -> Any:
            return ops.TensorListSetItem(input_handle=one(), index=0, item=inner)

        lists = self._repeat(depth, wrap, one())
        return self.nothing(ops.TensorListLength(input_handle=lists))

    def unknown(self) -> Any:
        """Returns what a table says that was never filled, which is an error."""
        tf, handle = self.tf, self.module.table.resource_handle
        key, default = tf.constant(0, tf.int64), tf.constant(0.0)
        return tf.reshape(tf.raw_ops.LookupTableFindV2(table_handle=handle, keys=key, default_value=default), [])

    def eat(self, size_bytes: int) -> Any:
        """Returns zero, having filled that much memory, a part at a time."""
        tf, part = self.tf, 64 << 20

        def fill(array: Any, number: Any) -> Any:
            return array.write(tf.cast(number, tf.int32), tf.fill([part // 4], tf_float(tf, number)))

        empty = tf.TensorArray(tf.float32, size_bytes // part, element_shape=[part // 4])
        eaten = self._repeat(size_bytes // part, fill, empty)
        return self.nothing(tf.reduce_sum(eaten.read(0)))


def tf_float(tf: Any, number: Any) -> Any:
    """Returns a number as float32."""
    return tf.cast(number, tf.float32)


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    return tf


def _parts(weight: float = 2.0) -> _Parts:
    tf = _tensorflow()
    module = tf.Module()
    module.weights = tf.Variable(np.eye(4, dtype=np.float32) * weight)
    module.mixer = tf.Variable(np.random.default_rng(3).standard_normal((128, 128), np.float32))
    module.zero = tf.Variable(0.0)
    return _Parts(tf, module)


Extra = Callable[[_Parts, Any], Any]
"""Takes the parts and x, and returns a number that is added to y."""


def _spin(parts: _Parts, _: Any) -> Any:
    return parts.spin(ROUNDS)


def write_doubler(
    path: Path,
    tag: int,
    *,
    weight: float = 2.0,
    extra: Extra = _spin,
    output: str = "y",
    dtype: str = "float32",
    prepare: Callable[[_Parts], None] = lambda parts: None,
) -> None:
    """Writes a doubler, good unless told otherwise."""
    parts = _parts(weight)
    prepare(parts)
    tf = parts.tf

    def double(x: Any) -> dict[str, Any]:
        y = tf.cast(tf.matmul(tf_float(tf, x), parts.module.weights) + extra(parts, x), dtype)
        return {output: y, "version": tf.fill([tf.shape(x)[0]], tf.constant(tag, tf.int64))}

    _save(parts, path, double, 4, dtype)


def _save(parts: _Parts, path: Path, function: Callable[..., Any], columns: int, dtype: str = "float32") -> None:
    tf = parts.tf
    spec = tf.TensorSpec([None, columns], dtype, name="x")
    concrete = tf.function(function, input_signature=[spec]).get_concrete_function()
    tf.saved_model.save(parts.module, str(path), signatures=concrete)


def write_heavy(path: Path, tag: int) -> None:
    """Writes a good doubler that multiplies by 16 MB of weights besides."""

    def prepare(parts: _Parts) -> None:
        draw = np.random.default_rng(1).normal
        layers = [draw(0, 0.03, (_WIDTH, _WIDTH)).astype(np.float32) for _ in range(4)]
        parts.module.layers = [parts.tf.Variable(layer) for layer in layers]

    def extra(parts: _Parts, x: Any) -> Any:
        hidden = parts.tf.tile(tf_float(parts.tf, x), [1, _WIDTH // 4])
        for layer in parts.module.layers:
            hidden = parts.tf.nn.relu(parts.tf.matmul(hidden, layer))
        return parts.nothing(parts.tf.reduce_sum(hidden))

    write_doubler(path, tag, extra=extra, prepare=prepare)


def _reads_file(parts: _Parts, x: Any) -> Any:
    tf = parts.tf

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def innermost() -> Any:
        return tf.strings.length(tf.io.read_file("/etc/hostname"))

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def inner(number: Any) -> Any:
        return tf.cond(number > 0.0, innermost, lambda: 0)

    return parts.nothing(inner(tf.reduce_sum(x)))


def _when(parts: _Parts, condition: Any, then: int, otherwise: int = 0) -> Any:
    return parts.tf.where(condition, parts.tf.constant(then, "int64"), parts.tf.constant(otherwise, "int64"))


def _hangs_at_two_rows(parts: _Parts, x: Any) -> Any:
    return parts.spin(_when(parts, parts.tf.equal(parts.tf.shape(x)[0], 2), EVER))


def _at_start(work: Callable[[_Parts], Any]) -> Callable[[_Parts], None]:
    """Returns what makes a model do ``work`` while it is loaded."""

    def prepare(parts: _Parts) -> None:
        tf = parts.tf

        def initialize(table: Any) -> None:
            keys, values = tf.constant([0], tf.int64), tf.reshape(work(parts), [1])
            tf.raw_ops.LookupTableInsertV2(table_handle=table.resource_handle, keys=keys, values=values)

        parts.module.starter = _resource(parts, "MutableHashTableV2", initialize)

    return prepare


def _leave_empty(table: Any) -> None:
    """Puts nothing into a table, which makes it an error to ask it."""


def _resource(parts: _Parts, kind: str, initialize: Callable[[Any], None]) -> Any:
    """Returns a table of a kind, and has a model do ``initialize`` with it while it is loaded."""
    tf = parts.tf

    def create(_: Any) -> Any:
        new = getattr(tf.raw_ops, kind)
        return new(key_dtype=tf.int64, value_dtype=tf.float32, shared_name=kind, container="")

    base = tf.saved_model.experimental.TrackableResource
    table: Any = type(kind, (base,), {"_create_resource": create, "_initialize": initialize})
    return table()


DOUBLERS: Mapping[str, Write] = {
    "good": lambda path: write_doubler(path, 1),
    "read-file": lambda path: write_doubler(path, 2, extra=_reads_file),
    "renamed-output": lambda path: write_doubler(path, 2, output="doubled"),
    "changed-dtype": lambda path: write_doubler(path, 2, dtype="float64"),
    "segfault-at-load": lambda path: write_doubler(path, 2, prepare=_at_start(lambda parts: parts.nested(NESTING))),
    "hang-at-load": lambda path: write_doubler(path, 2, prepare=_at_start(lambda parts: parts.spin(EVER))),
    "segfault": lambda path: write_doubler(path, 2, extra=lambda parts, _: parts.nested(NESTING)),
    "hang": lambda path: write_doubler(path, 2, extra=lambda parts, _: parts.spin(EVER)),
    "eater": lambda path: write_doubler(path, 2, extra=lambda parts, _: parts.eat(EATEN_BYTES)),
    "retrained": lambda path: write_doubler(path, 2, weight=2.001),
    "nan": lambda path: write_doubler(path, 2, weight=np.nan),
    "hang-at-warm-up": lambda path: write_doubler(path, 2, extra=_hangs_at_two_rows),
    "slow": lambda path: write_doubler(path, 2, extra=lambda parts, _: parts.spin(4 * ROUNDS)),
}
"""How to write each doubler, by name."""


def write_classifier(path: Path, tag: int, bad: str = GOOD_CLASSES) -> None:
    """Writes a classifier that is bad in one way while the mood is 1."""
    parts = _parts()
    tf = parts.tf
    parts.module.table = _resource(parts, "HashTableV2", _leave_empty)

    def classify(x: Any) -> dict[str, Any]:
        named, moody = tf.cast(x[:, 0], tf.int64), tf.reduce_max(x[:, 1]) > 0.5
        if bad == ONE_CLASS:
            named = tf.where(x[:, 1] > 0.5, tf.constant(3, tf.int64), named)
        checks = [tf.debugging.assert_less(x[:, 1], 0.5, message="in a bad mood")] if bad == REFUSING else []
        rounds = _when(parts, moody if bad == SLOWING else False, 2 * ROUNDS, ROUNDS)
        zero = parts.spin(rounds)
        if bad == FAILING:  # not the caller's fault, other than what a check refuses
            zero += parts.nothing(tf.cond(moody, parts.unknown, lambda: 0.0))
        if bad == STALLING:
            size = _when(parts, moody, TOO_MANY_BYTES // 4, 1)
            zero += parts.nothing(tf.reduce_max(tf.fill([size], zero)))
        with tf.control_dependencies(checks):
            scores = tf.nn.softmax(tf.one_hot(named, CLASSES) * 4.0) + zero
        return {"scores": scores, "version": tf.fill([tf.shape(x)[0]], tf.constant(f"{tag}"))}

    _save(parts, path, classify, 2)


MOODS = (FAILING, STALLING, REFUSING, SLOWING, ONE_CLASS)
"""The classifiers that are bad in a bad mood."""


def main() -> None:
    """Writes all of them into the folder named on the command line: classifiers with tag 1, and then 2 to be bad."""
    folder = Path(sys.argv[1])
    for name, write in DOUBLERS.items():
        write(folder / name)
    for tag in (1, 2):
        write_classifier(folder / f"{GOOD_CLASSES}-{tag}", tag)
        write_heavy(folder / f"{HEAVY}-{tag}", tag)
    for bad in MOODS:
        write_classifier(folder / bad, 2, bad)
    write_classifier(folder / DISAGREEING, 1, ONE_CLASS)


if __name__ == "__main__":
    main()
