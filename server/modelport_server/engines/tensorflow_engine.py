"""The SavedModel's own runtime. Imported in engine processes and by ``modelport predict --local`` only."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modelport_server.engines._imports import without
from modelport_server.engines.kinds import BFLOAT16, FLOAT32, PRECISIONS_OF, TENSORFLOW
from modelport_server.engines.parallel import ALONE, Parallelism
from modelport_server.engines.protocol import Array, EngineError
from modelport_server.engines.tensorflow_session import new_session, session_calls

_BFLOAT16_FLAGS = frozenset({"amx_bf16", "bf16"})
"""What /proc/cpuinfo has of processors, of Intel's and of ARM's kind, on which oneDNN computes float32 in bfloat16.
With AVX512-BF16 alone it does not: its kernels were those of float32 (``ONEDNN_VERBOSE=1``), and so were the answers.
"""
_MESSAGE_CHARACTERS = 400
_PREAMBLE = re.compile(r"Graph execution error:|Detected at node |<stack traces|Stack trace|\s")
"""What TensorFlow puts before the error itself: where it happened, with indented stack frames."""
_GRAPH_NODE = re.compile(r"\{\{.*?\}\}\s*")
_PATH = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+[\w.+-]*")


class TensorFlowEngine:
    """Runs signatures of a SavedModel: in a session where that reads the model, and else eagerly.

    A session loads faster than ``tf.saved_model.load``, and a call of it costs less (``docs/adr/0049``).

    Args:
        parallelism: how many batches run at once, and on how many threads.
        precision: what matrix products and convolutions of float32 are computed in: ``float32`` or ``bfloat16``.

    Raises:
        EngineError: if TensorFlow has no such precision, or none on this processor.
    """

    def __init__(self, *, parallelism: Parallelism = ALONE, precision: str = FLOAT32) -> None:
        if precision not in PRECISIONS_OF[TENSORFLOW]:
            raise EngineError(f"TensorFlow computes in {' or '.join(PRECISIONS_OF[TENSORFLOW])}, not in {precision}")
        self._precision = precision
        if precision == BFLOAT16:
            if not _BFLOAT16_FLAGS & _processor_flags():
                raise EngineError(
                    "TensorFlow does not compute in bfloat16 on this processor, which has no AMX or the like"
                )
            # Read with the first operation: https://oneapi-src.github.io/oneDNN/group_dnnl_api_fpmath_mode.html
            os.environ["ONEDNN_DEFAULT_FPMATH_MODE"] = "BF16"
        # Each version has a process of its own, and the first one would take all of a GPU's memory.
        os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
        self._tf = import_tensorflow()
        if precision == FLOAT32:  # GPUs from Ampere on would multiply in TensorFloat-32, of 10 bits, unasked
            self._tf.config.experimental.enable_tensor_float_32_execution(False)
        if parallelism.threads:
            # All sessions share one pool; with a single thread an operation runs on the thread that it is called on.
            pool = 1 if parallelism.threads == 1 else parallelism.threads * parallelism.instances
            self._tf.config.threading.set_intra_op_parallelism_threads(pool)
        with _quiet_stderr():  # these make TensorFlow's thread pools, which take on this thread's priority
            self._tf.constant(0)
            self._session = new_session(self._tf)
        self._model: Any = None
        self._calls: dict[str, Callable[[Mapping[str, Array]], Mapping[str, Array]]] = {}

    @property
    def name(self) -> str:
        """The engine and its version, and what is not as usual: the precision, a GPU, a model that it runs eagerly."""
        unusual = [] if self._precision == FLOAT32 else [self._precision]
        if self._tf.config.list_logical_devices("GPU"):
            unusual.append("on GPU")
        if self._model is not None:
            unusual.append("eagerly")
        return " ".join([f"tensorflow {self._tf.__version__}", *unusual])

    def load(self, path: Path, signatures: Sequence[str]) -> None:
        """Loads the SavedModel at ``path``.

        Raises:
            EngineError: if TensorFlow can't load it or a signature is missing.
        """
        try:
            self._calls = session_calls(self._tf, self._session, path, signatures)
        except Exception:  # what it can't do in a session, it may do eagerly, or say better why not
            self._session.close()
            self._calls = self._eager_calls(path, signatures)

    def _eager_calls(
        self, path: Path, signatures: Sequence[str]
    ) -> dict[str, Callable[[Mapping[str, Array]], Mapping[str, Array]]]:
        try:
            self._model = self._tf.saved_model.load(str(path))
        except Exception as error:
            raise EngineError(f"TensorFlow can't load it: {public_text(error)}") from error
        if missing := [name for name in signatures if name not in self._model.signatures]:
            raise EngineError(f"the loaded model has no signature {missing[0]!r}")
        return {name: partial(_run_eagerly, self._tf, self._model.signatures[name]) for name in signatures}

    def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Runs one batch.

        Raises:
            EngineError: if TensorFlow reports an error; the caller's fault if it is INVALID_ARGUMENT or
                OUT_OF_RANGE.
        """
        errors = self._tf.errors
        try:
            return self._calls[signature](inputs)
        except (errors.InvalidArgumentError, errors.OutOfRangeError) as error:
            raise EngineError(public_text(error), caller_fault=True) from error
        except Exception as error:
            raise EngineError(public_text(error)) from error


def _processor_flags() -> frozenset[str]:
    """Returns what Linux calls the instructions that this processor has; nothing where that can't be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":") for line in lines)
    return frozenset(next((flags.split() for name, _, flags in named if name.strip() in ("flags", "Features")), ()))


def import_tensorflow() -> Any:
    """Imports TensorFlow without Keras and with its start-up messages turned off, and returns it.

    A SavedModel needs no Keras, which is 40% of the import, with scikit-learn, SciPy and matplotlib where these are
    installed (``docs/adr/0052``).
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _quiet_stderr(), without("keras", "tf_keras"):
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


def _run_eagerly(tf: Any, function: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    outputs = function(**{name: tf.convert_to_tensor(array) for name, array in inputs.items()})
    return {name: _to_array(tensor.numpy(), tensor.dtype) for name, tensor in outputs.items()}


def _to_array(found: Any, dtype: Any) -> Array:
    import numpy as np

    return np.asarray(found, dtype=object if dtype == "string" else None)


def public_text(error: Exception) -> str:
    """Returns what an error says in one line, without graph nodes, stack frames and paths, cut to a bounded length."""
    text = str(getattr(error, "message", None) or error).strip() or type(error).__name__
    lines = text.splitlines()
    line = next((line for line in lines if line.strip() and not _PREAMBLE.match(line)), lines[0])
    return _PATH.sub("...", _GRAPH_NODE.sub("", line)).strip()[:_MESSAGE_CHARACTERS]
