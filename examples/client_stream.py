"""Streams an endless source of batches through a model and keeps count, come what may to the server.

Stop it with Ctrl-C. Meanwhile restart the server, or publish a new version: with ``--follow`` the
answers move on to it.

python examples/client_stream.py MODEL [--follow]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from modelport import Client, ModelportError, TensorInfo

ADDRESS = os.environ.get("MODELPORT_SERVER", "127.0.0.1:8500")
ROWS = 64


def noise(inputs: tuple[TensorInfo, ...]) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Yields random rows that the inputs can take, for ever."""
    chance = np.random.default_rng(0)
    while True:
        batch: dict[str, np.ndarray[Any, Any]] = {}
        for spec in inputs:
            shape = [size or 1 for size in (spec.shape or ())[1:]]
            batch[spec.name] = chance.integers(0, 10, (ROWS, *shape)).astype(spec.dtype)
        yield batch


def main() -> None:
    """Prints a line every hundred batches."""
    model = sys.argv[1] if len(sys.argv) > 1 else "digits"
    with Client(ADDRESS) as client:
        serving = next(v for v in client.model(model).versions if v.state.value == "available")
        inputs = serving.signatures["serving_default"].inputs
        seen: dict[int, int] = {}
        for result in client.predict_stream(model, noise(inputs), follow="--follow" in sys.argv, on_error="return"):
            if result.error:
                print(f"batch {result.index}: {result.error}")
                continue
            version = result.prediction.version
            seen[version] = seen.get(version, 0) + 1
            if result.index % 100 == 0:
                print(f"batch {result.index}: answers by version {seen}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ModelportError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
