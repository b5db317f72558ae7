"""What a server tells Prometheus: the choice of the engine, states, and what has become of calls."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from modelport.v1 import model_pb2
from modelport_registry import Golden, Registry
from modelport_server.gates.result import LOAD, SPEED
from modelport_server.metrics import ServerMetrics, serve_metrics
from modelport_server.rollout.status import StatusBoard
from modelport_server.routing import Router
from modelport_server.servable import Servable
from tests.integration.test_client_cli import modelport
from tests.support.expected import Case, by_tensorflow
from tests.support.launch import program
from tests.support.rollouts import AT_ONCE, canary_policy
from tests.support.rpc import Stream, call, joined, open_channel, outcomes, request, start, start_many, start_raw
from tests.support.server import ServerProcess, run_server, wait_for
from tests.support.stub_engine import hold_file, reached_file, stub_golden, write_stub
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


def place_of(server: ServerProcess) -> str:
    """Returns where its log says that metrics are."""
    found = re.search(r"metrics at (http://\S+/metrics)", server.log.read_text())
    assert found is not None
    return found[1]


def scrape(server: ServerProcess, path: str = "/metrics") -> Samples:
    """Returns every sample by name, with its labels."""
    with urllib.request.urlopen(place_of(server).removesuffix("/metrics") + path, timeout=20) as response:
        text = response.read().decode()
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def page() -> dict[str, set[str]]:
    """Returns the labels of every metric that the docs name."""
    rows = re.findall(r"^\| `(\w+)` \|([\w, ]*)\|", PAGE.read_text(), re.MULTILINE)
    return {name: set(labels.replace(",", "").split()) for name, labels in rows}


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
    assert of_model(samples, "modelport_max_batch_size", model) == [version.max_batch_size]
    assert of_model(samples, "modelport_golden_examples", model) == [version.golden_examples]
    assert of_model(samples, "modelport_calls_total", model) == [0] * 7
    assert of_model(samples, "modelport_serving_version", model) == [1]
    assert of_model(samples, "modelport_traffic_share", model, version="1") == [1]
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
        for name, array in inputs.items():
            none = {name: array[:0]}
            assert call(channel, request("bad_rows", none)).code is grpc.StatusCode.OK
            wrong = {name: array.astype(np.int8)}
            assert call(channel, request("bad_rows", wrong)).code is grpc.StatusCode.INVALID_ARGUMENT
        together = [request("bad_rows", inputs), request("bad_rows", bad)]
        codes = [outcome.code for _, outcome in sorted(outcomes(start_many(channel, joined(together))).items())]
        assert codes == [grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT]
        with Stream(channel) as stream:
            for sequence in (1, 2):
                assert stream.ask(request("bad_rows", inputs, sequence=sequence)).HasField("response")
            stream.close()
            assert stream.code() is grpc.StatusCode.OK
        nowhere: Any = channel
        with pytest.raises(grpc.RpcError):
            nowhere.unary_unary("/a.B/C")(b"", timeout=20)
    samples = scrape(server)
    assert of_model(samples, "modelport_calls_total", "bad_rows", grpc_code="OK") == [7]
    assert of_model(samples, "modelport_calls_total", "bad_rows", grpc_code="INVALID_ARGUMENT") == [3]
    assert of_model(samples, "modelport_calls_total", "two_inputs") == [0] * 7
    assert of_model(samples, "modelport_call_seconds_count", "bad_rows") == [7]
    below = of_model(samples, "modelport_call_seconds_bucket", "bad_rows")
    assert below == sorted(below)
    assert below[-1] == 7
    took_s = of_model(samples, "modelport_call_seconds_sum", "bad_rows")[0]
    busy_s = of_model(samples, "modelport_engine_seconds_total", "bad_rows")[0]
    assert 0 < busy_s < took_s
    assert of_model(samples, "modelport_rows_total", "bad_rows") == [6 * rows]
    assert of_model(samples, "modelport_batches_total", "bad_rows") == [6]
    assert of_model(samples, "modelport_calls_under_way", "bad_rows") == [0]
    assert of_model(samples, "modelport_waiting_rows", "bad_rows") == [0]
    ended = {
        (labels["grpc_service"].rpartition(".")[2], labels["grpc_method"], labels["grpc_code"]): value
        for labels, value in samples["grpc_server_handled_total"]
    }
    assert ended["PredictionService", "Predict", "OK"] == 4
    assert ended["PredictionService", "Predict", "INVALID_ARGUMENT"] == 2
    assert ended["PredictionService", "Predict", "NOT_FOUND"] == 1
    assert ended["PredictionService", "PredictStream", "OK"] == 1
    assert ended["PredictionService", "PredictMany", "OK"] == 1
    assert ended["unknown", "unknown", "UNIMPLEMENTED"] == 1


def test_calls_that_expire_are_told_apart_from_those_that_are_given_up(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish("m", write_stub(tmp_path / "stub", 1), golden=[stub_golden(1)])
    hold = tmp_path / "hold"
    hold.mkdir()
    x = {"x": np.zeros((1, 4), np.float32)}
    options = ("--metrics-address", "127.0.0.1:0")
    with run_server(registry.root, tmp_path / "server", *options, program=program(stub=True, hold=hold)) as server:
        server.wait_serving("m")
        hold_file(hold, 1, SPEED).touch()  # from now on its batches wait
        with open_channel(server.address) as channel:
            expiring = [start(channel, request("m", x), timeout_s=1.0) for _ in range(9)]
            given_up = start_raw(channel, request("m", x))
            wait_for(lambda: of_model(scrape(server), "modelport_calls_under_way", "m") == [10], "all calls")
            given_up.cancel()
            assert [wait().code for wait in expiring] == [grpc.StatusCode.DEADLINE_EXCEEDED] * 9
        hold_file(hold, 1, SPEED).unlink()
        wait_for(lambda: of_model(scrape(server), "modelport_calls_under_way", "m") == [0], "their ends")
        samples = scrape(server)
    assert of_model(samples, "modelport_calls_total", "m", grpc_code="DEADLINE_EXCEEDED") == [9]
    assert of_model(samples, "modelport_calls_total", "m", grpc_code="CANCELLED") == [1]


def test_an_engine_that_died_is_counted_and_down_until_it_is_back(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish("m", write_stub(tmp_path / "stub", 1), golden=[stub_golden(1)])
    hold = tmp_path / "hold"
    hold.mkdir()
    options = ("--metrics-address", "127.0.0.1:0")
    with run_server(registry.root, tmp_path / "server", *options, program=program(stub=True, hold=hold)) as server:

        def up() -> list[float]:
            return of_model(scrape(server), "modelport_engine_up", "m", version="1")

        def deaths() -> list[float]:
            return of_model(scrape(server), "modelport_engine_deaths_total", "m", version="1")

        server.wait_serving("m")
        assert (up(), deaths()) == ([1], [0])
        hold_file(hold, 1, LOAD).touch()  # where the next process waits
        children = psutil.Process(server.process.pid).children(recursive=True)
        next(one for one in children if "worker" in " ".join(one.cmdline())).kill()
        wait_for(reached_file(hold, 1, LOAD).exists, "the next process", server.alive)
        assert (up(), deaths()) == ([0], [1])
        hold_file(hold, 1, LOAD).unlink()
        wait_for(lambda: up() == [1], "the engine to be back", server.alive)
        assert deaths() == [1]


def test_tells_how_far_a_rollout_is_and_how_the_last_one_ended(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    hold = tmp_path / "hold"
    hold.mkdir()

    def publish(version: int) -> None:
        registry.publish("m", write_stub(tmp_path / f"stub{version}", version), golden=[stub_golden(version)])

    publish(1)
    registry.set_policy("m", AT_ONCE)
    options = ("--metrics-address", "127.0.0.1:0", "--poll-interval", "0.1")
    with run_server(registry.root, tmp_path / "server", *options, program=program(stub=True, hold=hold)) as server:

        def told(samples: Samples) -> dict[str, tuple[Labels, float]]:
            """Returns what is told of rollouts, by what follows ``rollout_`` in its name."""
            found = {name.partition("rollout_")[2]: of for name, of in samples.items() if "rollout_" in name}
            assert all(len(of) == 1 and of[0][0].pop("model") == "m" for of in found.values())
            assert all(page()[name] == {"model", *of[0][0]} for name, of in samples.items() if "rollout_" in name)
            return {name: of[0] for name, of in found.items()}

        def wait_told(phase: str, kind: str, step: int, *, paused: bool = False) -> None:
            of_candidate = {"version": "2"}
            wanted: dict[str, tuple[Labels, float]] = {
                "phase": ({"version": "2", "phase": phase, "step_kind": kind}, 1),
                "step": (of_candidate, step),
                "steps": (of_candidate, 2),
                "paused": (of_candidate, paused),
            }
            wait_for(lambda: wanted.items() <= told(scrape(server)).items(), f"{phase} {step}", server.alive)

        def wait_ended(version: int, outcome: str) -> None:
            wait_for(lambda: told(scrape(server)).keys() == {"end_time_seconds"}, "its end", server.alive)
            last = registry.state("m").last
            assert last is not None
            labels, ended_at = told(scrape(server))["end_time_seconds"]
            assert labels == {"version": str(version), "outcome": outcome}
            assert ended_at == pytest.approx(last.at.timestamp())

        server.wait_serving("m")
        wait_ended(1, "promoted")
        registry.set_policy("m", canary_policy((0.25, 1e6), (0.5, 1e6), watch_s=1e6))
        hold_file(hold, 2, LOAD).touch()
        publish(2)
        wait_told("gates", "", 0)
        hold_file(hold, 2, LOAD).unlink()
        wait_told("step", "canary", 1)
        registry.pause_rollout("m")
        wait_told("step", "canary", 1, paused=True)
        registry.resume_rollout("m")
        registry.promote("m")
        wait_told("watch", "", 0)
        registry.rollback("m", reason="complaints")
        wait_ended(2, "rolled back")


def test_the_page_names_every_metric_and_no_other(server: ServerProcess) -> None:
    samples = scrape(server, "/monitoring/prometheus/metrics")
    told: dict[str, set[str]] = {}
    for name, found in samples.items():
        labels = {label for names, _ in found for label in names} - {"le"}
        told.setdefault(re.sub(r"_(bucket|count|sum)$", "", name), set()).update(labels)
    assert {name: labels for name, labels in page().items() if name in told} == told
    assert all("rollout_" in name for name in page().keys() - told.keys())  # there may be none here


def test_openmetrics_is_told_to_who_asks_for_it(server: ServerProcess) -> None:
    with urllib.request.urlopen(
        urllib.request.Request(place_of(server), headers={"Accept": "application/openmetrics-text; version=1.0.0"}),
        timeout=20,
    ) as response:
        assert response.headers["Content-Type"].startswith("application/openmetrics-text")
        parser: Any = openmetrics
        families = list(parser.text_string_to_metric_families(response.read().decode()))
    assert {"modelport_call_seconds", "modelport_engine_choice"} <= {family.name for family in families}


async def test_what_fails_in_a_scrape_is_in_the_log_and_the_next_one_is_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = True

    def servables() -> list[Servable]:
        if failing:
            raise RuntimeError("it is broken")
        return []

    port = await serve_metrics("127.0.0.1:0", ServerMetrics(StatusBoard(), Router(), servables, dict, lambda: ()))
    place = f"http://127.0.0.1:{port}/metrics"
    with pytest.raises(urllib.error.HTTPError, match="500"):
        await asyncio.to_thread(urllib.request.urlopen, place, timeout=20)
    assert "RuntimeError: it is broken" in caplog.text
    failing = False
    with await asyncio.to_thread(urllib.request.urlopen, place, timeout=20) as response:
        assert response.status == 200


def test_peers_that_ask_nothing_keep_neither_callers_nor_scrapes_waiting_for_ever(server: ServerProcess) -> None:
    host, _, port = place_of(server).removeprefix("http://").partition("/")[0].rpartition(":")
    threads = psutil.Process(server.process.pid).num_threads()
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(socket.create_connection((host, int(port))))
        with socket.create_connection((host, int(port))) as broken:  # it goes away in the midst of a line
            broken.sendall(b"GET /met")
            broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_for(lambda: psutil.Process(server.process.pid).num_threads() >= threads + 4, "scrapes to be answered")
        assert psutil.Process(server.process.pid).num_threads() <= threads + 4 + 1  # and what reads the registry
        with open_channel(server.address) as channel:
            inputs = INPUTS["bad_rows", "serving_default"]
            assert call(channel, request("bad_rows", inputs)).code is grpc.StatusCode.OK
        assert of_model(scrape(server), "modelport_serving_version", "bad_rows") == [1]
        assert server.stop() == 0, "those that ask nothing keep it from ending"
    assert "Traceback" not in server.log.read_text()


def test_nothing_of_it_is_imported_or_listens_unless_it_is_asked_for(registry: Registry, tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import sys, modelport_server.app; print('prometheus_client' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "False\n"
    with run_server(registry.root, tmp_path, "--model", "two_inputs") as server:
        listening = [one for one in psutil.Process(server.process.pid).net_connections() if one.status == "LISTEN"]
        assert [one.laddr.port for one in listening] == [server.port]


@pytest.mark.parametrize("address", ["[::1]:0", "localhost:0"])
def test_listens_at_addresses_of_other_kinds_and_stops_with_the_server(
    registry: Registry, tmp_path: Path, address: str
) -> None:
    with run_server(registry.root, tmp_path, "--model", "two_inputs", "--metrics-address", address) as server:
        server.wait_serving("two_inputs")
        assert of_model(scrape(server), "modelport_serving_version", "two_inputs") == [1]
        place = place_of(server)
        assert server.stop() == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(place, timeout=5)


async def test_a_port_that_is_taken_is_told_in_one_line(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ran = await modelport(
            "serve", "--registry", registry.root, "--address", f"unix:{path}", "--metrics-address", address
        )
    assert ran.status == 1
    assert not path.exists()
    assert ran.err.splitlines()[-1] == (
        f"error: can't listen on {address}: Address already in use; choose another with --metrics-address HOST:PORT"
    )


@pytest.mark.parametrize(
    ("option", "address", "error"),
    [
        ("--metrics-address", "unix:/tmp/x", "--metrics-address must be HOST:PORT with a port up to 65535, not "),
        ("--metrics-address", "a..b:1", "can't listen on a..b:1: it is not a host's name; choose another with --m"),
        ("--address", "a..b:1", "can't listen on a..b:1: it is not a host's name; choose another with --address"),
    ],
)
async def test_an_address_that_is_none_is_told_in_one_line(
    registry: Registry, option: str, address: str, error: str
) -> None:
    ran = await modelport("serve", "--registry", registry.root, option, address)
    assert ran.status == 1
    assert ran.err.splitlines()[-1].startswith(f"error: {error}")
    assert "Traceback" not in ran.err
