"""What a server says it computes in is what it computes in, on whatever processor the tests run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modelport_registry import Golden, Registry
from tests.support.expected import Case, by_tensorflow
from tests.support.rpc import call, open_channel, request
from tests.support.saved_models import SERVING_DEFAULT
from tests.support.server import run_server

MODEL = "dense"
X = np.random.default_rng(5).standard_normal((24, 64)).astype(np.float32)
FLOAT32_ERROR = 1e-4
"""What answers in float32 are off by at most, and those in 16 bits are not."""


@pytest.fixture(scope="module")
def golden(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Golden]:
    """What TensorFlow answers in float32, for both signatures, with a tolerance that 16 bits keep."""
    signatures = (SERVING_DEFAULT, "double")
    cases = {name: Case(saved_models / MODEL, {"x": X}, name) for name in signatures}
    outputs = by_tensorflow(tmp_path_factory.mktemp("expected"), cases)
    return [Golden(name, {"x": X}, outputs[name], atol=0.5) for name in signatures]


@pytest.fixture
def registry(saved_models: Path, golden: list[Golden], tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    registry.publish(MODEL, saved_models / MODEL, golden=golden)
    return registry


@pytest.mark.parametrize(
    ("engine", "precision"), [("tensorflow", "bfloat16"), ("openvino", "bfloat16"), ("openvino", "float16")]
)
def test_what_is_told_is_what_is_computed(
    registry: Registry, golden: list[Golden], tmp_path: Path, engine: str, precision: str
) -> None:
    with run_server(registry.root, tmp_path, "--precision", precision, engine=engine) as server:
        server.wait_serving(MODEL)
        version = server.version(MODEL, 1)
        with open_channel(server.address) as channel:
            outcome = call(channel, request(MODEL, {"x": X}))
    error = np.abs(outcome.outputs["y"] - golden[0].outputs["y"]).max()
    warnings = [line for line in server.log.read_text().splitlines() if " WARNING " in line]
    if version.engine.endswith(f" {precision}"):
        assert FLOAT32_ERROR < error < 0.5
        assert (version.reason, warnings) == ("", [])
    else:
        assert version.engine.startswith(engine)
        assert error < FLOAT32_ERROR
        assert version.reason.startswith(f"runs in float32, not in {precision}: {engine} {precision}: load: ")
        assert "on this processor" in version.reason or "this processor does not" in version.reason
        (warning,) = warnings
        assert warning.endswith(f"{MODEL}@1: {version.reason}")


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_what_tensorflow_never_computes_in_is_refused_at_once(tmp_path: Path, precision: str) -> None:
    command = [sys.executable, "-m", "modelport", "serve", "--registry", str(tmp_path)]
    command += ["--address", "127.0.0.1:0", "--engine", "tensorflow", "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == f"error: TensorFlow does not compute in {precision}: use --engine openvino, or another --precision"
