"""The SavedModel's own runtime. Imported in engine processes and by ``modelport predict --local`` only."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelport_server.engines.kinds import FLOAT32
from modelport_server.engines.protocol import Array, EngineError

_FPMATH_MODES = {FLOAT32: "", "bfloat16": "BF16"}
"""oneDNN's names for what it may compute float32 in: https://oneapi-src.github.io/oneDNN/group_dnnl_api_fpmath_mode.html"""
_MESSAGE_CHARACTERS = 400
_PREAMBLE = re.compile(r"Graph execution error:|Detected at node |<stack traces|Stack trace|\s")
"""What TensorFlow puts before the error itself: where it happened, with indented stack frames."""
_GRAPH_NODE = re.compile(r"\{\{.*?\}\}\s*")
_PATH = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+[\w.+-]*")


class TensorFlowEngine:
    """Runs signatures of a SavedModel eagerly.

    Args:
        threads: how many threads one operation may use; 0 leaves it to TensorFlow.
        precision: what matrix products and convolutions of float32 are computed in: ``float32`` or ``bfloat16``.

    Raises:
        EngineError: if TensorFlow has no such precision.
    """

    def __init__(self, *, threads: int = 0, precision: str = FLOAT32) -> None:
        if precision not in _FPMATH_MODES:
            raise EngineError(f"TensorFlow computes in {' or '.join(_FPMATH_MODES)}, not in {precision}")
        self._precision = precision
        if mode := _FPMATH_MODES[precision]:
            os.environ["ONEDNN_DEFAULT_FPMATH_MODE"] = mode  # read when the first operation runs
        self._tf = import_tensorflow()
        if threads:
            self._tf.config.threading.set_intra_op_parallelism_threads(threads)
        with _quiet_stderr():
            self._tf.constant(0)  # makes TensorFlow's thread pools, which take on this thread's priority
        self._model: Any = None
        self._functions: dict[str, Any] = {}
        self._output_names: dict[str, list[str]] = {}

    @property
    def name(self) -> str:
        """The engine and its version."""
        precision = "" if self._precision == FLOAT32 else f" {self._precision}"
        return f"tensorflow {self._tf.__version__}{precision}"

    def load(self, path: Path, signatures: Sequence[str]) -> None:
        """Loads the SavedModel at ``path``.

        Raises:
            EngineError: if TensorFlow can't load it or a signature is missing.
        """
        try:
            self._model = self._tf.saved_model.load(str(path))
        except Exception as error:
            raise EngineError(f"TensorFlow can't load it: {public_text(error)}") from error
        for name in signatures:
            if name not in self._model.signatures:
                raise EngineError(f"the loaded model has no signature {name!r}")
            self._functions[name] = self._model.signatures[name]

    def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Runs one batch.

        Raises:
            EngineError: if TensorFlow reports an error; the caller's fault if it is INVALID_ARGUMENT or
                OUT_OF_RANGE.
        """
        errors = self._tf.errors
        try:
            tensors = {name: self._tf.convert_to_tensor(array) for name, array in inputs.items()}
            outputs = self._functions[signature](**tensors)
            return {name: _to_array(tensor) for name, tensor in outputs.items()}
        except (errors.InvalidArgumentError, errors.OutOfRangeError) as error:
            raise EngineError(public_text(error), caller_fault=True) from error
        except Exception as error:
            raise EngineError(public_text(error)) from error


def import_tensorflow() -> Any:
    """Imports TensorFlow with its start-up messages turned off, and returns it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _quiet_stderr():
        import tensorflow as tf
    return tf


@contextlib.contextmanager
def _quiet_stderr() -> Generator[None]:
    """Drops what native code writes to standard error: TensorFlow greets there whatever its log level."""
    sys.stderr.flush()
    saved = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    os.close(sink)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _to_array(tensor: Any) -> Array:
    import numpy as np

    return np.asarray(tensor.numpy(), dtype=object if tensor.dtype == "string" else None)


def public_text(error: Exception) -> str:
    """Returns what an error says in one line, without graph nodes, stack frames and paths, cut to a bounded length."""
    text = str(getattr(error, "message", None) or error).strip() or type(error).__name__
    lines = text.splitlines()
    line = next((line for line in lines if line.strip() and not _PREAMBLE.match(line)), lines[0])
    return _PATH.sub("...", _GRAPH_NODE.sub("", line)).strip()[:_MESSAGE_CHARACTERS]
