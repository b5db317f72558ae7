"""``modelport verify``: one version through all gates, without a server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelport_registry import Registry
from modelport_server.gates import prediction_log_pb2 as pb
from modelport_server.gates.result import GATES
from modelport_server.gates.warmup_requests import WARMUP_REQUESTS
from modelport_server.options import MIB
from tests.support.bad_versions import bad_golden, doubler_golden, flip_bit
from tests.support.launch import program
from tests.support.warmup_files import framed, log_of

MODEL = "doubler"
TAMED = program(max_memory_bytes=1500 * MIB)
"""The command with so little memory for an engine process that a wild model can't take the machine's."""


def _verify(root: Path, *arguments: str, program: tuple[str, ...] = ("modelport",)) -> tuple[int, str, str]:
    command = [
        sys.executable,
        "-m",
        *program,
        "verify",
        MODEL,
        "--engine",
        "tensorflow",
        *arguments,
        "--registry",
        str(root),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, ended.stdout, ended.stderr


def _document(
    root: Path, *arguments: str, program: tuple[str, ...] = ("modelport",)
) -> tuple[int, dict[str, Any], list[str]]:
    code, stdout, stderr = _verify(root, *arguments, "--json", program=program)
    return code, json.loads(stdout), stderr.splitlines()


@pytest.fixture(scope="module")
def registry(bad_versions: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """One good version, which is stable."""
    store = Registry(tmp_path_factory.mktemp("verify") / "registry")
    store.publish(MODEL, bad_versions / "good", golden=[doubler_golden(1)], aliases=["stable"])
    return store


ADVISED = ("safety", "signature", "speed")
"""Gates whose rules a model's policy may relax."""


def _publish(registry: Registry, bad_versions: Path, name: str) -> int:
    return registry.publish(MODEL, bad_versions / name, golden=[bad_golden(name, 2)]).version


def test_a_good_version_passes_all_gates(registry: Registry, bad_versions: Path) -> None:
    version = registry.publish(MODEL, bad_versions / "good", golden=[doubler_golden(1)]).version
    before = registry.state(MODEL), len(registry.journal(MODEL))
    code, document, stderr = _document(registry.root, str(version))
    gates = document.pop("gates")
    assert (code, document) == (0, {"model": MODEL, "version": version, "against": 1, "passed": True})
    assert [gate["gate"] for gate in gates] == list(GATES)
    assert {gate["outcome"] for gate in gates} == {"passed"}
    assert stderr == [
        *(f"doubler version {version}: {gate}" for gate in GATES),
        f"doubler version {version} passed all gates",
    ]
    figures = {gate["gate"]: gate["figures"] for gate in gates}
    assert figures["golden"]["examples"] == 8
    assert [case["rows"] for case in figures["speed"]["measured"]] == [1, 32]
    assert all(case["pairs"] >= 5 and case["candidate_cpu_us_per_row"] > 0 for case in figures["speed"]["measured"])
    assert (registry.state(MODEL), len(registry.journal(MODEL))) == before


def test_without_a_version_to_compare_with_two_gates_are_skipped(registry: Registry) -> None:
    code, stdout, stderr = _verify(registry.root, "stable")
    assert code == 0
    assert "signature  skipped" in stdout
    assert "speed      skipped" in stdout
    passed = (
        "doubler version 1 passed all gates but signature and speed, which compare it with another: --against VERSION"
    )
    assert stderr.endswith(f"{passed}\n")


@pytest.mark.parametrize(
    ("name", "gate", "reason"),
    [
        ("read-file", "safety", "the operation 'ReadFile' in function '__inference_innermost_"),
        ("renamed-output", "signature", "output of signature 'serving_default': 'y' (float32 [?, 4]) is gone"),
        ("changed-dtype", "signature", "'x' was float32 [?, 4] and is float64 [?, 4]"),
        ("retrained", "golden", "'y' differs from what was published"),
        ("segfault", "golden", "SIGSEGV"),
        ("slow", "speed", "times as long"),
    ],
)
def test_a_bad_version_is_rejected_at_its_gate(
    registry: Registry, bad_versions: Path, name: str, gate: str, reason: str
) -> None:
    version = _publish(registry, bad_versions, name)
    code, document, stderr = _document(registry.root, str(version), program=TAMED)
    assert (code, document["passed"]) == (1, False)
    failed = document["gates"][-1]
    assert [one["gate"] for one in document["gates"]] == list(GATES[: GATES.index(gate) + 1])
    assert [one["outcome"] for one in document["gates"]] == ["passed"] * GATES.index(gate) + ["failed"]
    assert reason in failed["reason"]
    assert ("modelport policy doubler --" in failed["reason"]) is (gate in ADVISED)
    assert stderr[-1] == f"error: doubler version {version} is rejected at the gate {gate}: {failed['reason']}"


def test_a_damaged_file_is_rejected_and_the_table_says_what_was_not_run(registry: Registry, bad_versions: Path) -> None:
    version = registry.publish(MODEL, bad_versions / "good", golden=[doubler_golden(1)]).version
    flip_bit(registry.path(MODEL, version))
    code, stdout, stderr = _verify(registry.root, str(version))
    assert code == 1
    assert stdout.count("not run") == 6
    assert f"doubler version {version} is rejected at the gate integrity: " in stderr


@pytest.mark.slow
def test_warm_up_requests_are_run_and_rejected_where_damaged(
    registry: Registry, bad_versions: Path, tmp_path: Path
) -> None:
    tensor = pb.TensorProto(dtype=1, float_val=[1.5])
    for size in (2, 4):
        tensor.tensor_shape.dim.add(size=size)
    data = framed(log_of({"x": tensor}))
    versions: list[int] = []
    for content in (data, data[:-1]):
        folder = tmp_path / f"model-{len(versions)}"
        shutil.copytree(bad_versions / "good", folder)
        (folder / WARMUP_REQUESTS).parent.mkdir()
        (folder / WARMUP_REQUESTS).write_bytes(content)
        versions.append(registry.publish(MODEL, folder, golden=[doubler_golden(1)]).version)
    good, damaged = (_document(registry.root, str(version)) for version in versions)
    assert good[0] == 0
    assert good[1]["gates"][5]["figures"]["requests"] == 1
    assert damaged[0] == 1
    assert damaged[1]["gates"][-1]["gate"] == "warm-up"
    assert "warm-up request 1 can't be used" in damaged[1]["gates"][-1]["reason"]


@pytest.mark.slow
def test_the_rules_are_those_of_the_model(bad_versions: Path, tmp_path: Path) -> None:
    store = Registry(tmp_path / "registry")
    store.publish(MODEL, bad_versions / "good", golden=[doubler_golden(1)], aliases=["stable"])
    renamed = _publish(store, bad_versions, "renamed-output")
    slow = _publish(store, bad_versions, "slow")
    policy = replace(store.state(MODEL).policy, allow_signature_changes=True, max_speed_ratio=50.0)
    store.set_policy(MODEL, policy)
    code, document, _ = _document(store.root, str(renamed))
    assert code == 0
    assert document["gates"][2]["figures"]["changes"]
    assert _document(store.root, str(slow), "--against", "1")[0] == 0


def test_mistakes_are_one_line(registry: Registry) -> None:
    for arguments, text in (
        (["99"], "doubler has no version 99"),
        (["1", "--against", "blue"], "doubler has no alias 'blue'"),
        (["1", "--max-batch-size", "0"], "--max-batch-size must be at least 1"),
    ):
        code, stdout, stderr = _verify(registry.root, *arguments)
        assert (code, stdout, len(stderr.splitlines())) == (1, "", 1)
        assert text in stderr
