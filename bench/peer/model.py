"""The model in a peer's process: the same engine, called in the same way, as modelport has.

Run in the peer's own environment, where modelport is not installed: only its folders are on the path.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIGNATURE = "serving_default"
Run = Callable[[Any], Any]
"""Takes images, uint8 ``[batch, 28, 28]``, and returns probabilities, float32 ``[batch, 10]``."""


def load(engine: str, path: str) -> Run:
    """Returns what runs the SavedModel at ``path`` on ``tensorflow``, ``openvino`` or ``openvino-bfloat16``."""
    return _tensorflow(path) if engine == "tensorflow" else _openvino(path, bfloat16=engine.endswith("bfloat16"))


def _tensorflow(path: str) -> Run:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    from modelport_server.engines.tensorflow_session import new_session, session_calls

    call = session_calls(tf, new_session(tf), Path(path), [SIGNATURE])[SIGNATURE]
    return lambda images: call({"images": images})["probabilities"]


def _openvino(path: str, *, bfloat16: bool) -> Run:
    import openvino

    precision = "bf16" if bfloat16 else "f32"
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    core: Any = openvino.Core()
    request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()

    def run(images: Any) -> Any:
        request.set_input_tensor(0, openvino.Tensor(np.require(images, requirements=["C", "W"]), shared_memory=True))
        request.infer(share_outputs=True)
        return request.get_output_tensor(0).data

    return run
