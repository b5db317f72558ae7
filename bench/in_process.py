"""``python -m bench.in_process ENGINE SAVED_MODEL SECONDS``: an engine's own best rate, without any server.

Prints a line of JSON: rows per second by the number of rows of a batch.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from modelport.names import DEFAULT_SIGNATURE

SIZES = (1, 32, 64, 128, 256)
_LEAST_RUNS = 5


def main() -> None:
    """Measures."""
    kind, _, precision = sys.argv[1].partition("-")
    engine = _engine(kind, precision or "float32")
    engine.load(Path(sys.argv[2]), [DEFAULT_SIGNATURE])
    seconds = float(sys.argv[3]) / len(SIZES)
    rates: dict[int, float] = {}
    for rows in SIZES:
        images = np.random.default_rng(rows).integers(0, 256, (rows, 28, 28)).astype(np.uint8)
        rates[rows] = rows / _median_s(engine, images, seconds)
    print(json.dumps(rates))


def _engine(kind: str, precision: str) -> Any:
    if kind == "openvino":
        from modelport_server.engines.openvino_engine import OpenVINOEngine

        return OpenVINOEngine(precision=precision)
    from modelport_server.engines.tensorflow_engine import TensorFlowEngine

    return TensorFlowEngine(precision=precision)


def _median_s(engine: Any, images: Any, seconds: float) -> float:
    for _ in range(_LEAST_RUNS):
        engine.run(DEFAULT_SIGNATURE, {"images": images})
    took: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(took) < _LEAST_RUNS:
        began = time.perf_counter()
        engine.run(DEFAULT_SIGNATURE, {"images": images})
        took.append(time.perf_counter() - began)
    return statistics.median(took)


if __name__ == "__main__":
    main()
