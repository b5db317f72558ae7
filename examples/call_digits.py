"""Calls the digits classifier that ``modelport train`` makes: once, and as a stream.

modelport train --registry models
modelport serve --registry models
python examples/call_digits.py
"""

from __future__ import annotations

import os
import sys

import numpy as np

from modelport import Client, ModelportError

ADDRESS = os.environ.get("MODELPORT_SERVER", "127.0.0.1:8500")


def main() -> None:
    """Sends random pixels, for want of handwriting."""
    images = np.random.default_rng(0).integers(0, 256, (1000, 8, 8), dtype=np.uint8)
    with Client(ADDRESS) as client:
        answer = client.predict("digits", images[:4])
        print(f"version {answer.version} says {answer['classes']}, in {answer.engine_time_s * 1000:.2f} ms")

        rows = 0
        for result in client.predict_stream("digits", np.array_split(images, 20)):
            rows += len(result.prediction["classes"])
        print(f"{rows} rows came back from the stream")


if __name__ == "__main__":
    try:
        main()
    except ModelportError as error:
        sys.exit(f"error: {error}")
