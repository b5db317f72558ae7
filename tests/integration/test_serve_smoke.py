"""The thinnest line: publish, serve, one call, stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np

from modelport.tensors import decode, encode
from modelport.v1 import prediction_pb2, prediction_pb2_grpc
from modelport_registry import Published
from tests.support.server import run_server


def test_a_published_version_answers(tmp_path: Path, publish_tag: Callable[[Path, str, int], Published]) -> None:
    publish_tag(tmp_path / "registry", "toy", 7)
    with run_server(tmp_path / "registry", tmp_path) as server:
        server.wait_serving("toy", 1)
        with grpc.insecure_channel(server.address) as channel:
            stub = prediction_pb2_grpc.PredictionServiceStub(channel)
            x = np.ones((3, 4), np.float32)
            request = prediction_pb2.PredictRequest(model="toy", inputs=[encode("x", x)], sequence=5)
            answer = stub.Predict(request, timeout=20)
        outputs = {tensor.name: decode(tensor) for tensor in answer.outputs}
        assert answer.version == 1
        assert answer.sequence == 5
        np.testing.assert_array_equal(outputs["y"], x * 2)
        np.testing.assert_array_equal(outputs["version"], np.full(3, 7))
        assert server.version("toy", 1).golden_examples == 2
        assert server.stop() == 0
