"""OpenVINO: reads SavedModels itself, without TensorFlow. Imported in engine processes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelport.names import DEFAULT_SIGNATURE
from modelport_server.engines.protocol import Array, EngineError

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""OpenVINO's names for the types that it may compute in."""
_MESSAGE_CHARACTERS = 400


class OpenVINOEngine:
    """Runs the signature ``serving_default`` of a SavedModel on the processor.

    Args:
        threads: how many threads one batch may use; 0 leaves it to OpenVINO.
        precision: what it computes in, one of ``PRECISIONS``; inputs and outputs keep their types.
    """

    def __init__(self, *, threads: int = 0, precision: str = "float32") -> None:
        import openvino

        self._openvino = openvino
        self._core = openvino.Core()
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        }
        if threads:
            self._options["INFERENCE_NUM_THREADS"] = threads
        self._precision = precision
        self._requests: dict[str, Any] = {}
        self._outputs: dict[str, dict[str, int]] = {}

    @property
    def name(self) -> str:
        """The engine and its version, and the precision if it is not float32."""
        version = self._openvino.__version__.partition("-")[0]
        precision = "" if self._precision == "float32" else f" {self._precision}"
        return f"openvino {version}{precision}"

    def load(self, path: Path, signatures: Sequence[str]) -> None:
        """Loads the SavedModel at ``path`` and compiles it.

        Raises:
            EngineError: if OpenVINO can't read or compile it.
        """
        for signature in signatures:
            if signature != DEFAULT_SIGNATURE:
                raise EngineError(f"OpenVINO reads the signature {DEFAULT_SIGNATURE} only, and not {signature!r}")
            try:
                compiled = self._core.compile_model(self._core.read_model(path), "CPU", self._options)
            except Exception as error:
                raise EngineError(f"OpenVINO can't read it: {_public(error)}") from error
            self._requests[signature] = compiled.create_infer_request()
            self._outputs[signature] = {
                name: number for number, output in enumerate(compiled.outputs) for name in output.get_names()
            }

    def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Runs one batch.

        Raises:
            EngineError: if OpenVINO reports an error.
        """
        request = self._requests[signature]
        try:
            # Shared, because to copy inputs fails once they are larger than those of the run before.
            request.infer(dict(inputs), share_inputs=True)
            return {name: np.array(request.get_output_tensor(number).data) for name, number in self._outputs[signature].items()}
        except Exception as error:
            raise EngineError(f"OpenVINO failed: {_public(error)}") from error


def _public(error: Exception) -> str:
    """Returns the last line of what an error says: those before it name source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:_MESSAGE_CHARACTERS]
