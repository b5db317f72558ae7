"""The benchmarks start, end, and leave their figures; what the figures are is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.loading import VARIANTS
from bench.shadow import LOADS
from modelport_server.gates.result import GATES


def figures(name: str, tmp_path: Path) -> list[dict[str, Any]]:
    """Returns the rounds of a benchmark's quick mode."""
    path = tmp_path / f"{name}.json"
    command = [sys.executable, "-m", "bench", name, "--quick", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    document = json.loads(path.read_text())
    assert document["machine"]["cores"] >= 1
    rounds: list[dict[str, Any]] = document["rounds"]
    return rounds


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


def test_unknown_benchmark() -> None:
    done = subprocess.run([sys.executable, "-m", "bench", "speed"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: there is no benchmark 'speed': it is one of serving, loading, shadow\n"
