"""``python -m bench.in_process ENGINE SAVED_MODEL SECONDS INSTANCES THREADS``: an engine's own rate, without a server.

Prints a line of JSON: rows per second by the number of rows of a batch, while INSTANCES batches run at once on THREADS
threads each.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from modelport.names import DEFAULT_SIGNATURE
from modelport_server.engines.instances import Instances
from modelport_server.engines.parallel import Parallelism

SIZES = (1, 32, 64, 128, 256)
_FIRST_RUNS = 5


def main() -> None:
    """Measures."""
    kind, _, precision = sys.argv[1].partition("-")
    parallelism = Parallelism(int(sys.argv[4]), int(sys.argv[5]))
    engine = _engine(kind, precision or "float32", parallelism)
    engine.load(Path(sys.argv[2]), [DEFAULT_SIGNATURE])
    seconds = float(sys.argv[3]) / len(SIZES)
    with Instances(parallelism.instances) as instances:
        print(json.dumps({rows: _rows_per_s(engine, instances, parallelism, rows, seconds) for rows in SIZES}))


def _engine(kind: str, precision: str, parallelism: Parallelism) -> Any:
    if kind == "openvino":
        from modelport_server.engines.openvino_engine import OpenVINOEngine

        return OpenVINOEngine(precision=precision, parallelism=parallelism)
    from modelport_server.engines.tensorflow_engine import TensorFlowEngine

    return TensorFlowEngine(precision=precision, parallelism=parallelism)


def _rows_per_s(engine: Any, instances: Instances, parallelism: Parallelism, rows: int, seconds: float) -> float:
    images = np.random.default_rng(rows).integers(0, 256, (rows, 28, 28)).astype(np.uint8)
    together = threading.Barrier(parallelism.instances)
    rates: list[float] = []

    def run() -> None:
        for _ in range(_FIRST_RUNS):
            engine.run(DEFAULT_SIGNATURE, {"images": images})
        together.wait()
        began, count = time.perf_counter(), 0
        while (spent_s := time.perf_counter() - began) < seconds:
            engine.run(DEFAULT_SIGNATURE, {"images": images})
            count += 1
        rates.append(rows * count / spent_s)

    instances.run(run)
    return sum(rates)


if __name__ == "__main__":
    main()
