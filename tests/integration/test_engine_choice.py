"""Real models on the engines that there are: the answers are TensorFlow's, whichever runs them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from modelport.v1 import model_pb2
from modelport_registry import Golden, Registry
from tests.support.expected import Arrays, Case, by_tensorflow
from tests.support.rpc import call, engines, open_channel, request
from tests.support.saved_models import SERVING_DEFAULT
from tests.support.server import ServerProcess, run_server, wait_for
from tests.support.zoo import INPUTS

OK = grpc.StatusCode.OK
BEGUN_AHEAD = 6
"""How many words the command line of an engine process has that was begun ahead: one that was not, has more."""
READS = {"two_inputs", "signatures"}
"""What OpenVINO can run."""
WHY_NOT = {
    "bad_rows": "refuse inputs: Assert",
    "scalars": "not given int64",
    "strings": "not given string",
    "no_batch": "MatrixDeterminant",
}
"""Why OpenVINO can't run others."""
MODELS = READS | WHY_NOT.keys()

Expected = dict[str, dict[str, NDArray[Any]]]


@pytest.fixture(scope="module")
def expected(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """What TensorFlow answers, by model and signature."""
    cases = {
        f"{model}.{signature}": Case(saved_models / "zoo" / model, inputs, signature)
        for (model, signature), inputs in INPUTS.items()
        if model in MODELS
    }
    return by_tensorflow(tmp_path_factory.mktemp("expected"), cases)


@pytest.fixture(scope="module")
def registry(saved_models: Path, expected: Expected, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(tmp_path_factory.mktemp("registry"))
    for model in sorted(MODELS):
        golden = [
            Golden(signature, inputs, expected[f"{model}.{signature}"])
            for (name, signature), inputs in INPUTS.items()
            if name == model
        ]
        registry.publish(model, saved_models / "zoo" / model, golden=golden)
    return registry


@pytest.fixture(scope="module")
def server(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Generator[ServerProcess]:
    with run_server(registry.root, tmp_path_factory.mktemp("server"), "--threads", "1", engine="auto") as server:
        for model in MODELS:
            server.wait_serving(model)
        yield server


def attempts(server: ServerProcess, model: str) -> dict[str, model_pb2.EngineAttempt]:
    """Returns how each engine did, by name without its version."""
    return {attempt.engine.split()[0]: attempt for attempt in server.version(model, 1).engines}


@pytest.mark.parametrize("name", sorted(f"{model}.{signature}" for model, signature in INPUTS if model in MODELS))
def test_answers_are_those_of_tensorflow(server: ServerProcess, expected: Expected, name: str) -> None:
    model, signature = name.split(".")
    with open_channel(server.address) as channel:
        outcome = call(channel, request(model, INPUTS[model, signature], signature=signature))
    assert outcome.code is OK, outcome.message
    assert outcome.outputs.keys() == expected[name].keys()
    for output, array in outcome.outputs.items():
        wanted = expected[name][output]
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
        if wanted.dtype == object:
            assert array.tolist() == wanted.tolist()
        else:
            np.testing.assert_allclose(array, wanted, rtol=1e-5)


@pytest.mark.parametrize("model", sorted(READS))
def test_the_faster_of_two_is_taken_and_says_so(server: ServerProcess, model: str) -> None:
    found = attempts(server, model)
    assert found.keys() == {"openvino", "tensorflow"}
    taken = [attempt for attempt in found.values() if not attempt.reason]
    assert [attempt.engine for attempt in taken] == [server.version(model, 1).engine]
    assert all(attempt.row_ms for attempt in found.values())
    log = server.log.read_text()
    assert all(f"{model}@1: {attempt.engine}: {attempt.reason or 'taken'}" in log for attempt in found.values())


@pytest.mark.parametrize("model", sorted(WHY_NOT))
def test_what_openvino_cant_run_runs_on_tensorflow(server: ServerProcess, model: str) -> None:
    found = attempts(server, model)
    assert WHY_NOT[model] in found["openvino"].reason
    assert not found["tensorflow"].reason
    assert server.version(model, 1).engine.startswith("tensorflow")


def test_a_bad_row_is_still_refused(server: ServerProcess) -> None:
    with open_channel(server.address) as channel:
        outcome = call(channel, request("bad_rows", {"x": np.array([-1.0], np.float32)}))
    assert outcome.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "x is negative" in outcome.message


def test_one_engine_for_each_version_is_left(server: ServerProcess) -> None:
    assert len(engines(psutil.Process(server.process.pid))) == len(MODELS)


def test_what_is_begun_ahead_runs_the_first_version(registry: Registry, tmp_path: Path) -> None:
    with run_server(registry.root, tmp_path, "--model", "two_inputs", engine="openvino") as server:
        server.wait_serving("two_inputs")
        (engine,) = psutil.Process(server.process.pid).children()
        assert "modelport_server.engines.worker" in engine.cmdline()
        assert len(engine.cmdline()) == BEGUN_AHEAD


def test_nothing_that_is_begun_ahead_is_left_where_nothing_is_loaded(tmp_path: Path) -> None:
    with run_server(tmp_path / "nothing", tmp_path, engine="openvino") as server:
        front = psutil.Process(server.process.pid)
        wait_for(lambda: not front.children(), "what was begun ahead to end", server.alive)


def test_a_server_that_cant_listen_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    with run_server(registry.root, tmp_path, "--model", "two_inputs", engine="openvino") as server:
        command = [sys.executable, "-m", "modelport", "serve", "--registry", str(registry.root)]
        command += ["--address", server.address, "--engine", "auto"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = f"error: can't listen on {server.address}: Address already in use; choose another with --address HOST:PORT"
    assert done.stderr.splitlines()[-1] == said
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("nowhere.invalid:8500", "Name or service not known"),
        ("192.0.2.1:8500", "Cannot assign requested address"),
        ("unix:/nowhere/x.sock", "No such file or directory"),
    ],
)
def test_why_it_cant_listen(tmp_path: Path, address: str, why: str) -> None:
    command = [sys.executable, "-m", "modelport", "serve", "--registry", str(tmp_path), "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = f"error: can't listen on {address}: {why}; choose another with --address HOST:PORT"
    assert done.stderr.splitlines()[-1] == said
    assert "Traceback" not in done.stderr


def test_options_for_a_model_that_is_not_there_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    with run_server(tmp_path / "registry", tmp_path, engine="absent=openvino") as server:
        wait_for(lambda: "absent: the registry has no such model yet" in server.log.read_text(), "it", server.alive)


def test_a_server_that_cant_tell_its_port_says_so(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "nowhere" / "port"
    command = [sys.executable, "-m", "modelport", "serve", "--registry", str(registry.root)]
    command += ["--address", "127.0.0.1:0", "--port-file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: can't write the --port-file {file}: No such file or directory"
    assert "Traceback" not in done.stderr


def test_openvino_alone_never_imports_tensorflow(registry: Registry, tmp_path: Path, expected: Expected) -> None:
    arguments = ("--model", "two_inputs", "--precision", "bfloat16")
    with run_server(registry.root, tmp_path, *arguments, engine="openvino") as server:
        server.wait_serving("two_inputs")
        assert server.version("two_inputs", 1).engine.startswith("openvino")
        front = psutil.Process(server.process.pid)
        mapped = [entry.path for process in (front, *front.children()) for entry in process.memory_maps()]
        with open_channel(server.address) as channel:
            outcome = call(channel, request("two_inputs", INPUTS["two_inputs", SERVING_DEFAULT]))
    assert any("openvino" in path for path in mapped)
    assert not any("libtensorflow" in path for path in mapped)
    # Whatever was asked for, the answers are the published ones.
    sums: Arrays = expected[f"two_inputs.{SERVING_DEFAULT}"]
    np.testing.assert_allclose(outcome.outputs["sum"], sums["sum"], rtol=1e-5)
