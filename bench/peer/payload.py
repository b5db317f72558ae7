"""Writes ModelInferRequests of the open inference protocol. Arguments: folder, numbers of rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc

for rows in map(int, sys.argv[2:]):
    images = np.random.default_rng(rows).integers(0, 256, (rows, 28, 28)).astype(np.uint8)
    entry: Any = grpc.InferInput("images", images.shape, "UINT8")
    entry.set_data_from_numpy(images)
    request: Any = grpc.service_pb2.ModelInferRequest(
        model_name="classic",
        inputs=[entry._get_tensor()],  # noqa: SLF001 - what it sends itself
        raw_input_contents=[entry._get_content()],  # noqa: SLF001
    )
    (Path(sys.argv[1]) / f"v2-{rows}").write_bytes(request.SerializeToString())
