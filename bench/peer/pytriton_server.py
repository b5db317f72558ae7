"""Serves the model with PyTriton. Arguments: engine, SavedModel, port of gRPC, two more ports, largest batch."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from model import load
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def main() -> None:
    """Serves until it is ended."""
    engine, path, grpc_port, http_port, metrics_port, largest = sys.argv[1:]
    run = load(engine, path)

    @batch
    def infer(images: Any) -> dict[str, Any]:
        return {"probabilities": run(images)}

    config = TritonConfig(grpc_port=int(grpc_port), http_port=int(http_port), metrics_port=int(metrics_port))
    with Triton(config=config) as triton:
        triton.bind(
            model_name="classic",
            infer_func=infer,
            inputs=[Tensor(name="images", dtype=np.uint8, shape=(28, 28))],
            outputs=[Tensor(name="probabilities", dtype=np.float32, shape=(10,))],
            config=ModelConfig(max_batch_size=int(largest), batcher=DynamicBatcher()),
        )
        triton.serve()


main()
