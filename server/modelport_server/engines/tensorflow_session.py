"""Signatures of a SavedModel in a session: the leanest way that TensorFlow has of calling them.

Whoever uses this has imported TensorFlow, and passes it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message_factory import GetMessageClass

from modelport_server.engines.protocol import Array

_TAGS = ("serve",)


class NotInSessionError(Exception):
    """A session would not compute what the model does."""


def new_session(tf: Any) -> Any:
    """Returns a session with a graph of its own."""
    return tf.compat.v1.Session(graph=tf.Graph())


def session_calls(
    tf: Any, session: Any, path: Path, signatures: Sequence[str]
) -> dict[str, Callable[[Mapping[str, Array]], Mapping[str, Array]]]:
    """Loads a SavedModel into a session; returns what runs each signature on inputs by name.

    Args:
        tf: TensorFlow.
        session: has an empty graph.
        path: the SavedModel.
        signatures: their names.

    Raises:
        NotInSessionError: if a signature is missing, or reads variables that a session does not restore.
        Exception: whatever TensorFlow raises for what it can't read.
    """
    level = tf.get_logger().level
    tf.get_logger().setLevel("ERROR")  # it would say that sessions are of the past
    try:
        with session.graph.as_default():
            found = tf.compat.v1.saved_model.load(session, _TAGS, str(path)).signature_def
            calls = {name: _call(tf, session, found[name]) for name in signatures if name in found}
    finally:
        tf.get_logger().setLevel(level)
    if missing := [name for name in signatures if name not in calls]:
        raise NotInSessionError(f"no signature {missing[0]!r}")
    return calls


def _call(tf: Any, session: Any, spec: Any) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    graph = session.graph
    given = {name: tensor.name for name, tensor in spec.inputs.items()}
    wanted = {name: graph.get_tensor_by_name(tensor.name) for name, tensor in spec.outputs.items()}
    if len(set(given.values())) < len(given) or set(given.values()) & {tensor.name for tensor in wanted.values()}:
        raise NotInSessionError("one tensor has two names, or is input and output")
    _check_restored(tf, session, [tensor.op for tensor in wanted.values()])
    fetched = sorted({tensor.name for tensor in wanted.values()})
    options = _callable_options(tf)(feed=list(given.values()), fetch=fetched)
    # ``make_callable`` is public, but takes no options, and with inputs it is no faster than ``run``.
    run = session._make_callable_from_options(options)  # noqa: SLF001
    places = {name: (fetched.index(tensor.name), tensor.dtype == "string") for name, tensor in wanted.items()}

    def call(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        found = run(*(inputs[name] for name in given))
        return {name: np.asarray(found[at], object if text else None) for name, (at, text) in places.items()}

    return call


def _callable_options(tf: Any) -> Any:
    """Returns the message class, which TensorFlow has under no public name."""
    file: Any = tf.compat.v1.RunOptions.DESCRIPTOR.file
    return GetMessageClass(file.message_types_by_name["CallableOptions"])


def _check_restored(tf: Any, session: Any, outputs: Iterable[Any]) -> None:
    """Makes sure that all variables that outputs depend on have values: it restores some kinds of models in part.

    Raises:
        NotInSessionError: if one has none.
    """
    handles = [op.outputs[0] for op in _ancestors(outputs) if op.type == "VarHandleOp"]
    restored = session.run([tf.raw_ops.VarIsInitializedOp(resource=handle) for handle in handles])
    if bare := [handle.op.name for handle, there in zip(handles, restored, strict=True) if not there]:
        raise NotInSessionError(f"the variable {bare[0]} has no value")


def _ancestors(ops: Iterable[Any]) -> Iterable[Any]:
    found: dict[str, Any] = {}
    left = list(ops)
    while left:
        op = left.pop()
        if op.name not in found:
            found[op.name] = op
            left += [*op.control_inputs, *(tensor.op for tensor in op.inputs)]
    return found.values()
