"""int8: taken where the golden examples are reproduced all the same, by a real OpenVINO and a real nncf."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from modelport_registry import Golden, Registry
from tests.support.expected import Case, by_tensorflow
from tests.support.rpc import call, open_channel, request
from tests.support.saved_models import SERVING_DEFAULT
from tests.support.server import run_server

MODEL = "dense"
X = np.random.default_rng(5).standard_normal((24, 64)).astype(np.float32)
CLOSE = 1e-4
"""The default tolerance, relative; the absolute one is smaller."""


@pytest.fixture(scope="module")
def golden(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Golden]:
    """What TensorFlow answers, for both signatures."""
    signatures = (SERVING_DEFAULT, "double")
    cases = {name: Case(saved_models / MODEL, {"x": X}, name) for name in signatures}
    outputs = by_tensorflow(tmp_path_factory.mktemp("expected"), cases)
    return [Golden(name, {"x": X}, outputs[name]) for name in signatures]


def published(root: Path, folder: Path, golden: list[Golden], atol: float = 1e-5) -> Registry:
    registry = Registry(root)
    registry.publish(MODEL, folder, golden=[replace(example, atol=atol) for example in golden])
    return registry


def verify(registry: Registry, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "modelport", "verify", MODEL, "1", "-r", str(registry.root)]
    done = subprocess.run([*command, "--precision", "int8", *arguments], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_it_is_served_where_its_publisher_tolerates_it(
    saved_models: Path, golden: list[Golden], tmp_path: Path
) -> None:
    registry = published(tmp_path / "registry", saved_models / MODEL, golden, atol=0.1)
    with run_server(registry.root, tmp_path, "--precision", f"{MODEL}=int8", engine="openvino") as server:
        server.wait_serving(MODEL)
        assert server.version(MODEL, 1).engine.startswith("openvino")
        assert server.version(MODEL, 1).engine.endswith(" int8")
        (engine,) = psutil.Process(server.process.pid).children()
        assert not engine.children()
        mapped = [entry.path for entry in engine.memory_maps()]
        with open_channel(server.address) as channel:
            outcome = call(channel, request(MODEL, {"x": X}))
    off = np.abs(outcome.outputs["y"] - golden[0].outputs["y"])
    assert CLOSE < off.max() < 0.1
    assert not any("/scipy/" in path for path in mapped)  # nncf has been elsewhere
    log = server.log.read_text()
    assert "Traceback" not in log
    assert all(" INFO " in line for line in log.splitlines()), log


def test_it_is_float32_where_int8_differs_too_much(saved_models: Path, golden: list[Golden], tmp_path: Path) -> None:
    registry = published(tmp_path / "registry", saved_models / MODEL, golden)
    with run_server(registry.root, tmp_path, "--precision", "int8", engine="openvino") as server:
        server.wait_serving(MODEL)
        version = server.version(MODEL, 1)
        with open_channel(server.address) as channel:
            outcome = call(channel, request(MODEL, {"x": X}))
    assert version.engine.startswith("openvino")
    assert "int8" not in version.engine
    tried, taken = version.engines
    assert tried.engine == "openvino int8"
    assert tried.reason.startswith("golden: serving_default: output 'y' differs from what was published in ")
    assert not taken.reason
    assert f"{MODEL}@1: openvino int8: {tried.reason}" in server.log.read_text()
    np.testing.assert_allclose(outcome.outputs["y"], golden[0].outputs["y"], rtol=CLOSE, atol=1e-5)


def test_verify_says_whether_it_would_be_taken(saved_models: Path, golden: list[Golden], tmp_path: Path) -> None:
    strict = published(tmp_path / "strict", saved_models / MODEL, golden)
    loose = published(tmp_path / "loose", saved_models / MODEL, golden, atol=0.1)
    code, table, said = verify(strict, "--engine", "openvino")
    assert (code, "int8" in table) == (0, False)
    assert f"{MODEL} version 1: openvino int8: golden: serving_default: output 'y' differs" in said
    code, table, said = verify(loose, "--engine", "openvino")
    assert (code, " int8" in table, "int8" in said) == (0, True, False)


def test_a_signature_without_golden_examples(saved_models: Path, golden: list[Golden], tmp_path: Path) -> None:
    registry = published(tmp_path / "registry", saved_models / MODEL, golden[:1], atol=0.1)
    code, table, said = verify(registry, "--engine", "openvino")
    assert (code, "int8" in table) == (0, False)
    assert "openvino int8: it can't be told whether it reproduces the model: not every signature has golden" in said


def test_a_model_that_has_nothing_to_compute_in_int8(saved_models: Path, tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    golden = [Golden(SERVING_DEFAULT, {"x": x}, {"y": x * 2, "version": np.full(2, 1, np.int64)})]
    registry = published(tmp_path / "registry", saved_models / "versioned-1", golden)
    code, table, said = verify(registry, "--engine", "openvino")
    assert (code, "int8" in table) == (0, False)
    assert "openvino int8: load: nothing of it can be computed in int8" in said


def test_tensorflow_is_told_off(saved_models: Path, golden: list[Golden], tmp_path: Path) -> None:
    registry = published(tmp_path / "registry", saved_models / MODEL, golden, atol=0.1)
    code, table, said = verify(registry, "--engine", "tensorflow")
    assert (code, table) == (1, "")
    assert said == "error: TensorFlow does not compute in int8: use --engine openvino, or another --precision\n"
