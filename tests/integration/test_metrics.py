"""What a server tells Prometheus: the choice of the engine, states, and what has become of calls."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from modelport.v1 import model_pb2
from modelport_registry import Golden, Registry
from tests.integration.test_client_cli import modelport
from tests.support.expected import Case, by_tensorflow
from tests.support.rpc import Stream, call, open_channel, request
from tests.support.server import ServerProcess, run_server, wait_for
from tests.support.zoo import INPUTS

MODELS = {"two_inputs": "serving_default", "bad_rows": "serving_default"}
"""OpenVINO runs the first, and not the second, which fails on rows that are below 0."""
PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

Labels = dict[str, str]
Samples = dict[str, list[tuple[Labels, float]]]


@pytest.fixture(scope="module")
def registry(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    cases = {name: Case(saved_models / "zoo" / name, INPUTS[name, of], of) for name, of in MODELS.items()}
    expected = by_tensorflow(tmp_path_factory.mktemp("expected"), cases)
    registry = Registry(tmp_path_factory.mktemp("registry"))
    for name, of in MODELS.items():
        registry.publish(name, saved_models / "zoo" / name, golden=[Golden(of, INPUTS[name, of], expected[name])])
    return registry


@pytest.fixture
def server(registry: Registry, tmp_path: Path) -> Generator[ServerProcess]:
    with run_server(
        registry.root, tmp_path, "--threads", "1", "--metrics-address", "127.0.0.1:0", engine="auto"
    ) as server:
        for model in MODELS:
            server.wait_serving(model)
        yield server


def scrape(server: ServerProcess, path: str = "/metrics") -> Samples:
    """Returns every sample by name, with its labels."""
    found = re.search(r"metrics at http://(\S+)/metrics", server.log.read_text())
    assert found is not None
    with urllib.request.urlopen(f"http://{found[1]}{path}", timeout=20) as response:
        text = response.read().decode()
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def of_model(samples: Samples, name: str, model: str, **labels: str) -> list[float]:
    """Returns the values of a metric for a model, and for further labels."""
    wanted = {"model": model, **labels}
    return [value for found, value in samples.get(name, []) if wanted.items() <= found.items()]


@pytest.mark.parametrize("model", MODELS)
def test_tells_of_each_engine_what_the_status_tells(server: ServerProcess, model: str) -> None:
    version = server.version(model, 1)
    samples = scrape(server)
    told = [
        (labels["engine"], labels["reason"])
        for labels, value in samples["modelport_engine_choice_info"]
        if labels["model"] == model and value == 1
    ]
    assert told == [(attempt.engine, attempt.reason) for attempt in version.engines]
    assert len({engine.split()[0] for engine, _ in told}) == 2
    assert [reason for _, reason in told].count("") == 1
    measured = {
        (attempt.engine, str(rows)): ms / 1e3 for attempt in version.engines for rows, ms in attempt.row_ms.items()
    }
    assert bool(measured) == (model == "two_inputs")
    seconds = {
        (labels["engine"], labels["rows"]): value
        for labels, value in samples.get("modelport_engine_choice_row_seconds", [])
        if labels["model"] == model
    }
    assert seconds == pytest.approx(measured)
    assert of_model(samples, "modelport_engine_info", model, engine=version.engine) == [1]
    assert of_model(samples, "modelport_engine_instances", model, version="1") == [version.instances]
    assert of_model(samples, "modelport_engine_threads", model, version="1") == [version.threads]
    assert of_model(samples, "modelport_max_batch_rows", model) == [version.max_batch_size]
    assert of_model(samples, "modelport_golden_examples", model) == [version.golden_examples]
    assert of_model(samples, "modelport_serving_version", model) == [1]
    assert version.state == model_pb2.ModelVersion.STATE_AVAILABLE
    assert of_model(samples, "modelport_version_state", model, state="available") == [1]


def test_counts_calls_by_how_they_ended(server: ServerProcess) -> None:
    inputs = INPUTS["bad_rows", "serving_default"]
    ((name, good),) = inputs.items()
    bad = {name: np.full_like(good, -1)}
    rows = len(good)
    with open_channel(server.address) as channel:
        for _ in range(3):
            assert call(channel, request("bad_rows", inputs)).code is grpc.StatusCode.OK
        assert call(channel, request("bad_rows", bad)).code is grpc.StatusCode.INVALID_ARGUMENT
        assert call(channel, request("nothing", inputs)).code is grpc.StatusCode.NOT_FOUND
        with Stream(channel) as stream:
            for sequence in (1, 2):
                assert stream.ask(request("bad_rows", inputs, sequence=sequence)).HasField("response")
            stream.close()
            assert stream.code() is grpc.StatusCode.OK
        nowhere: Any = channel
        with pytest.raises(grpc.RpcError):
            nowhere.unary_unary("/a.B/C")(b"", timeout=20)
    samples = scrape(server)
    assert of_model(samples, "modelport_calls_total", "bad_rows", grpc_code="OK") == [5]
    assert of_model(samples, "modelport_calls_total", "bad_rows", grpc_code="INVALID_ARGUMENT") == [1]
    assert of_model(samples, "modelport_calls_total", "two_inputs") == [0]
    assert of_model(samples, "modelport_call_seconds_count", "bad_rows") == [5]
    below = of_model(samples, "modelport_call_seconds_bucket", "bad_rows")
    assert below == sorted(below)
    assert below[-1] == 5
    took_s = of_model(samples, "modelport_call_seconds_sum", "bad_rows")[0]
    busy_s = of_model(samples, "modelport_engine_seconds_total", "bad_rows")[0]
    assert 0 < busy_s < took_s
    assert of_model(samples, "modelport_rows_total", "bad_rows") == [5 * rows]
    assert of_model(samples, "modelport_batches_total", "bad_rows") == [5]
    assert of_model(samples, "modelport_calls_under_way", "bad_rows") == [0]
    assert of_model(samples, "modelport_waiting_rows", "bad_rows") == [0]
    ended = {
        (labels["grpc_service"].rpartition(".")[2], labels["grpc_method"], labels["grpc_code"]): value
        for labels, value in samples["grpc_server_handled_total"]
    }
    assert ended["PredictionService", "Predict", "OK"] == 3
    assert ended["PredictionService", "Predict", "INVALID_ARGUMENT"] == 1
    assert ended["PredictionService", "Predict", "NOT_FOUND"] == 1
    assert ended["PredictionService", "PredictStream", "OK"] == 1
    assert ended["unknown", "unknown", "UNIMPLEMENTED"] == 1


def test_an_engine_that_died_is_counted(server: ServerProcess) -> None:
    def deaths() -> float:
        return sum(value for _, value in scrape(server)["modelport_engine_deaths_total"])

    assert deaths() == 0
    children = psutil.Process(server.process.pid).children(recursive=True)
    worker = next(one for one in children if "worker" in " ".join(one.cmdline()))
    worker.kill()
    wait_for(lambda: deaths() == 1, "the death to be counted", server.alive)


def test_the_page_names_every_metric_and_no_other(server: ServerProcess) -> None:
    samples = scrape(server, "/monitoring/prometheus/metrics")
    told = {
        re.sub(r"_(bucket|count|sum|created)$", "", name)
        for name in samples
        if name.startswith(("modelport_", "grpc_", "process_"))
    }
    named = set(re.findall(r"^\| `(\w+)`", PAGE.read_text(), re.MULTILINE))
    assert named == told


async def test_a_port_that_is_taken_is_told_in_one_line(registry: Registry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ran = await modelport(
            "serve", "--registry", registry.root, "--address", "127.0.0.1:0", "--metrics-address", address
        )
    assert ran.status == 1
    assert ran.err.splitlines()[-1] == (
        f"error: can't listen on {address}: Address already in use; choose another with --metrics-address HOST:PORT"
    )


async def test_an_address_that_is_none_is_told_in_one_line(registry: Registry) -> None:
    ran = await modelport("serve", "--registry", registry.root, "--metrics-address", "unix:/tmp/x")
    assert ran.status == 1
    assert ran.err == "error: --metrics-address must be HOST:PORT with a port up to 65535, not 'unix:/tmp/x'\n"
