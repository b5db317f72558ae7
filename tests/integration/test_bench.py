"""The benchmarks start, end, and leave their figures; what the figures are is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from bench.__main__ import BENCHMARKS
from bench.accurate import PRESETS
from bench.gates import QUICK
from bench.loading import VARIANTS
from bench.peers import CASES, ENGINES
from bench.scaling import MOST_ROWS
from bench.sdk import CASES as SDK_CASES
from bench.shadow import LOADS
from bench.startup import ENGINES as STARTED
from bench.transport import CONCURRENCIES
from modelport_server.engines.kinds import PRECISIONS
from modelport_server.gates.result import GATES


def figures(name: str, tmp_path: Path) -> list[dict[str, Any]]:
    """Returns the rounds of a benchmark's quick mode."""
    rounds: list[dict[str, Any]] = document(name, tmp_path)["rounds"]
    return rounds


def document(name: str, tmp_path: Path) -> dict[str, Any]:
    """Returns all that a benchmark's quick mode leaves."""
    path = tmp_path / f"{name}.json"
    command = [sys.executable, "-m", "bench", name, "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["machine"]["cores"] >= 1
    return found


@pytest.mark.slow
def test_loading(tmp_path: Path) -> None:
    rounds = figures("loading", tmp_path)
    assert [one["variant"] for one in rounds] == [variant.name for variant in VARIANTS]
    for one in rounds:
        assert one["quiet"]["calls"] > 0
        assert one["loading"]["calls"] > 0
        assert one["quiet"]["failed"] == one["loading"]["failed"] == 0
        assert one["first_call_ms"] > 0
        assert one["ratio"]["p99"] > 0
        assert [gate["gate"] for gate in one["gates"]] == list(GATES)


@pytest.mark.slow
def test_shadow(tmp_path: Path) -> None:
    rounds = figures("shadow", tmp_path)
    assert [one["load"] for one in rounds] == [load.name for load in LOADS]
    for one in rounds:
        assert one["without"]["calls"] > 0
        assert one["without"]["failed"] == one["shadowed"]["failed"] == 0
        assert one["copied"] + one["dropped"] > 0


@pytest.mark.slow
def test_gates(tmp_path: Path) -> None:
    found = document("gates", tmp_path)
    assert [(one["case"], one["gate"]) for one in found["rounds"]] == [(case.name, case.gate) for case in QUICK]
    for one in found["rounds"]:
        assert one["seconds_to_rejection"] > 0
        assert one["quiet"]["calls"] > 0
        assert one["during"]["calls"] > 0
        assert one["quiet"]["failed"] == one["during"]["failed"] == 0
        assert one["ratio"]["p99"] > 0
    (pooled,) = found["pooled"]
    assert pooled == found["pooled_over_all_rounds"]
    for stretch in ("quiet", "during"):
        assert pooled[stretch]["calls"] == sum(one[stretch]["calls"] for one in found["rounds"])
    assert 0 < pooled["strictly"]["calls"] < pooled["during"]["calls"]


def test_accurate(tmp_path: Path) -> None:
    found = document("accurate", tmp_path)
    assert [one["preset"] for one in found["rounds"]] == list(PRESETS)
    for one in found["rounds"]:
        assert (one["seed"], one["epochs"], one["best_epoch"]) == (1, 1, 1)
        assert 0 < one["accuracy"] <= 1
        assert 0 < one["training_s"] < one["command_s"]
    assert found["summary"]["training_ratio"] == found["summary"]["training_ratio_highest"] > 0


def test_precisions(tmp_path: Path) -> None:
    found = {row["precision"]: row for row in document("precisions", tmp_path)["precisions"]}
    assert {"float32", "int8"} <= found.keys() <= set(PRECISIONS)  # others are left out where a processor has none
    assert all(row["load_s"] > 0 and row["ms_1"] < row["ms_128"] for row in found.values())
    assert found["float32"]["largest_difference"] < 1e-6 < 1e-5 < found["int8"]["largest_difference"] < 0.1


@pytest.mark.slow
def test_startup(tmp_path: Path) -> None:
    rounds = figures("startup", tmp_path)
    assert [one["engine"] for one in rounds] == list(STARTED)
    for one in rounds:
        assert 0 < one["listening_s"] < one["answered_s"]
        assert [gate["gate"] for gate in one["gates"]] == list(GATES)
        assert one["memory_mib"]["engine"]["rss"] > 0
        assert ("zygote" in one["memory_mib"]) == (one["engine"] != "openvino")


WITH_LOADGEN = pytest.mark.skipif(
    subprocess.run(["pkg-config", "--exists", "grpc++"], check=False).returncode != 0 if which("pkg-config") else True,
    reason="the load generator takes gRPC for C++",
)


@pytest.mark.slow
@WITH_LOADGEN
def test_peers_without_any(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    options = ["--servers", "modelport", "--rounds", "1", "--seconds", "0.5", "--environments", str(tmp_path / "peers")]
    command = [sys.executable, "-m", "bench", "peers", *options, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert {row["engine"] for row in rows} == set(ENGINES)
    assert len(rows) == len(ENGINES) * (1 + len(CASES))
    assert all(row["rows_per_s"] > 0 and row["failed"] == 0 for row in rows if "server" in row)


@pytest.mark.slow
@WITH_LOADGEN
def test_cost(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    command = [sys.executable, "-m", "bench", "cost", "--rounds", "1", "--seconds", "0.5", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == [case.name for case in CASES]
    assert all(row["us"]["loop"] > 0 and row["us"]["engine"] > 0 for row in rows)


@WITH_LOADGEN
def test_transport(tmp_path: Path) -> None:
    rounds = figures("transport", tmp_path)
    assert {(one["way"], one["concurrency"]) for one in rounds} >= {
        (way, concurrency) for way in ("grpc.aio", "modelport") for concurrency in CONCURRENCIES
    }
    assert all(one["per_s"] > 0 and one["us"] > 0 and one["failed"] == 0 for one in rounds)


@pytest.mark.slow
@WITH_LOADGEN
def test_scaling(tmp_path: Path) -> None:
    path, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    options = ["--rounds", "1", "--seconds", "0.3", "--models", "3", "--stream-rows", "2000"]
    command = [sys.executable, "-m", "bench", "scaling", *options, "--json", str(path), "--picture", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert max(row["in_flight"] for row in found["rows_in_flight"]) == MOST_ROWS
    assert {row["models"] for row in found["many_models"]} == {1, 3}
    assert found["stream"]["rows"] >= 2000
    assert picture.stat().st_size > 0


@pytest.mark.slow
@WITH_LOADGEN
def test_sdk_without_the_other(tmp_path: Path) -> None:
    path = tmp_path / "sdk.json"
    options = [
        "--sdks",
        "modelport",
        "--models",
        "light",
        "--engines",
        "tensorflow",
        "--rounds",
        "1",
        "--seconds",
        "0.5",
    ]
    folders = ["--environments", str(tmp_path / "peers"), "--clients", str(tmp_path / "clients")]
    command = [sys.executable, "-m", "bench", "sdk", *options, *folders, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["program"] for row in rows] == [program for case in SDK_CASES for program in case.programs]
    assert all(row["rows_per_s"] > 0 for row in rows)


def test_unknown_benchmark() -> None:
    done = subprocess.run([sys.executable, "-m", "bench", "speed"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    known = ", ".join(BENCHMARKS)
    assert done.stderr == f"error: there is no benchmark 'speed': it is one of {known}\n"
