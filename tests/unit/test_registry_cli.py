from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: TID253 - numpy alone has no bfloat16
import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from modelport.exceptions import ModelportError
from modelport_registry import JSON, Registry
from modelport_registry._cli import register
from tests.support.saved_models import SERVING_DEFAULT, write_fake_saved_model

MODEL = "digits"
Run = Callable[..., Result]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_fake_saved_model(tmp_path / "model")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def run(registry: Registry) -> Run:
    app = typer.Typer()
    register(app)
    runner = CliRunner(env={"MODELPORT_REGISTRY": str(registry.root), "COLUMNS": "200", "NO_COLOR": "1"})

    def invoke(*arguments: object) -> Result:
        return runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)

    return invoke


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def save(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


def mistake(result: Result) -> str:
    assert isinstance(result.exception, ModelportError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_publish_with_everything(run: Run, registry: Registry, model: Path, tmp_path: Path) -> None:
    golden = tmp_path / "golden.npz"
    x = np.ones((2, 4), np.float32)
    save(golden, {"inputs/x": x, f"{SERVING_DEFAULT}/outputs/y": x * 2})
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("<p>")
    said = document(
        run("publish", MODEL, model, "--golden", golden, "--rtol", 0.01, "--metric", "accuracy=0.99", "--metric",
            "loss=1e-3", "--tag", "a", "--tag", "b", "--alias", "stable", "--report", tmp_path / "report", "--param",
            "epochs=10", "--param", "layers=[32, 64]", "--param", "optimizer=adam", "--param", "note=a=b",
            "--code-revision", "c0ffee", "--data-sha256", "ab", "--source", "notebook", "--version", 4, "--json")
    )  # fmt: skip
    manifest = registry.verify(MODEL, 4)
    assert (said["model"], said["version"], said["golden"], said["warnings"]) == (MODEL, 4, 2, [])
    assert Path(said["path"]) == registry.path(MODEL, 4)
    assert manifest.metrics == {"accuracy": 0.99, "loss": 0.001}
    assert manifest.tags == ("a", "b")
    assert manifest.lineage.parameters == {"epochs": 10, "layers": [32, 64], "optimizer": "adam", "note": "a=b"}
    assert (manifest.lineage.code_revision, manifest.lineage.data_sha256) == ("c0ffee", "ab")
    assert registry.golden(MODEL, 4)[0].rtol == 0.01
    assert registry.resolve(MODEL, alias="stable") == 4
    assert "report/index.html" in [entry["path"] for entry in said["files"]]


def test_publish_says_what_it_wrote_and_warns(run: Run, registry: Registry, model: Path) -> None:
    result = run("publish", MODEL, model)
    assert result.exit_code == 0
    where = registry.root / MODEL / "1"
    assert result.stdout == f"published {MODEL} version 1: 3 files, 162 B, no golden examples, in {where}\n"
    assert result.stderr.startswith("warning: no golden examples")


def test_golden_examples_of_other_types(run: Run, registry: Registry, tmp_path: Path) -> None:
    model = write_fake_saved_model(
        tmp_path / "m", {"f": ({"b": ("bfloat16", [None]), "s": ("string", [None])}, {"y": ("bool", [None])})}
    )
    bits = np.array([1.5, -2], ml_dtypes.bfloat16)
    save(tmp_path / "g.npz", {"f/inputs/b": bits, "f/inputs/s": ["ä", "b"], "f/outputs/y": [True, False]})
    assert run("publish", MODEL, model, "--golden", tmp_path / "g.npz").exit_code == 0
    golden = registry.golden(MODEL, 1)[0]
    assert golden.inputs["b"].tolist() == bits.tolist()
    assert golden.inputs["s"].tolist() == ["ä".encode(), b"b"]


def test_the_golden_examples_of_a_version_are_published_again(run: Run, registry: Registry, tmp_path: Path) -> None:
    model = write_fake_saved_model(
        tmp_path / "m", {"f": ({"b": ("bfloat16", [None]), "s": ("string", [None])}, {"y": ("bool", [None])})}
    )
    bits = np.array([1.5, -2], ml_dtypes.bfloat16)
    save(tmp_path / "g.npz", {"f/inputs/b": bits, "f/inputs/s": ["ä", "b"], "f/outputs/y": [True, False]})
    run("publish", MODEL, model, "--golden", tmp_path / "g.npz", "--rtol", 0.5)
    stored = registry.path(MODEL, 1) / "golden.npz"
    (tmp_path / "link.npz").symlink_to(stored)
    assert document(run("publish", MODEL, model, "--golden", tmp_path / "link.npz", "--json"))["golden"] == 2
    assert (registry.path(MODEL, 2) / "golden.npz").read_bytes() == stored.read_bytes()
    run("publish", MODEL, model, "--golden", stored, "--atol", 0.25)
    (golden,) = registry.golden(MODEL, 3)
    assert (golden.rtol, golden.atol) == (0.5, 0.25)
    damaged = bytearray(stored.read_bytes())
    damaged[damaged.index(b"inputs")] ^= 1
    (tmp_path / "damaged.npz").write_bytes(damaged)
    said = mistake(run("publish", MODEL, model, "--golden", tmp_path / "damaged.npz"))
    assert said.endswith("can't be read: golden.npz is damaged")
    assert registry.versions(MODEL) == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "accuracy"], "'accuracy' is not NAME=VALUE"),
        (["--metric", "accuracy=high"], "give a number"),
        (["--metric", "accuracy=nan"], "finite"),
        (["--param", "=1"], "is not NAME=VALUE"),
        (["--golden", "nowhere.npz"], "there is no file"),
        (["--golden", "pickled.npz"], "not a readable .npz"),
        (["--golden", "array.npy"], "not a readable .npz"),
        (["--golden", "misnamed.npz"], "has an array 'x': call it inputs/NAME"),
        (["--report", "nowhere"], "not a folder"),
        (["--alias", "A"], "not an alias"),
        (["--version", "0"], "not a version number"),
    ],
)
def test_a_mistake_is_one_line(
    run: Run, registry: Registry, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save(Path("pickled.npz"), {"inputs/x": np.array([{}], dtype=object)})
    save(Path("misnamed.npz"), {"x": np.ones(1)})
    np.save("array.npy", np.ones(1))
    assert message in mistake(run("publish", MODEL, model, *arguments))
    assert not registry.root.exists()


def test_lists(run: Run, registry: Registry, model: Path) -> None:
    assert f"there is no {registry.root}" in mistake(run("models"))
    registry.root.mkdir()
    assert f"no models in {registry.root}" in run("models").stderr
    for _ in range(2):
        registry.publish(MODEL, model, metrics={"loss": 0.5}, tags=["[bold]x"])
    registry.set_alias(MODEL, "stable", 1)
    assert document(run("models", "--json")) == {
        "models": [{"model": MODEL, "versions": [1, 2], "aliases": {"stable": 1}}]
    }
    assert run("models").stdout.splitlines()[1].split() == [MODEL, "2", "2", "stable=1"]
    assert [version["version"] for version in document(run("show", MODEL, "--json"))["versions"]] == [1, 2]
    row = run("show", MODEL).stdout.splitlines()[1]
    assert row.split()[-3:] == ["stable", "loss=0.5", "[bold]x"]
    for version in ("1", "stable"):
        assert document(run("show", MODEL, version, "--json"))["version"] == 1
    assert "serving_default(x float32[any, 4]) -> y float32[any, 4]" in run("show", MODEL, "2").stdout
    assert "no version 3" in mistake(run("show", MODEL, "3"))
    assert "no alias 'best'" in mistake(run("show", MODEL, "best"))
    assert "no model 'other'" in mistake(run("show", "other"))
    assert len(document(run("journal", MODEL, "--json"))) == 3
    assert "alias=stable" in run("journal", MODEL).stdout


def test_one_damaged_model_does_not_hide_the_others(run: Run, registry: Registry, model: Path) -> None:
    registry.publish(MODEL, model)
    registry.publish("other", model)
    (registry.root / MODEL / "state.json").write_text("{")
    result = run("models", "--json")
    assert [row["model"] for row in document(result)["models"]] == ["other"]
    assert result.stderr.startswith("warning: the state of digits is damaged")


def test_verify(run: Run, registry: Registry, model: Path) -> None:
    for _ in range(2):
        registry.publish(MODEL, model)
    assert run("check", MODEL).exit_code == 0
    (registry.path(MODEL, 1) / "extra").write_text("")
    result = run("check", MODEL)
    assert result.exit_code == 1
    assert result.stderr == "error: digits version 1: 'extra' was not published\n"
    assert "version 2 is as it was published" in result.stdout
    result = run("check", MODEL, "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert (said["ok"], [row["ok"] for row in said["versions"]]) == (False, [False, True])
    assert run("check", MODEL, "2").exit_code == 0
    assert run("check", MODEL, "1").exit_code == 1
    assert "no model" in mistake(run("check", "other"))


def test_alias(run: Run, registry: Registry, model: Path) -> None:
    for _ in range(2):
        registry.publish(MODEL, model)
    assert run("alias", MODEL, "stable", "1").stdout == "digits stable is version 1, pinned\n"
    assert run("alias", MODEL, "stable").stdout == "digits stable is version 1, pinned\n"
    assert document(run("alias", MODEL, "canary", "2", "--json"))["generation"] == 2
    run("alias", MODEL, "stable", "canary", "--expected-generation", "2")
    assert registry.resolve(MODEL) == 2
    assert "generation 3, not 2" in mistake(run("alias", MODEL, "stable", "1", "--expected-generation", "2"))
    assert run("alias", MODEL, "canary", "--delete").exit_code == 0
    assert registry.state(MODEL).aliases == {"stable": 2}
    assert "not both" in mistake(run("alias", MODEL, "stable", "1", "--delete"))
    assert "later versions wait" in run("alias", MODEL, "stable", "1").stderr


def test_pin(run: Run, registry: Registry, model: Path) -> None:
    for _ in range(2):
        registry.publish(MODEL, model)
    assert "no version is in charge yet" in mistake(run("pin", MODEL))
    assert run("pin", MODEL, "1", "--reason", "a freeze").stdout == "digits is pinned to version 1\n"
    assert registry.journal(MODEL)[-1].reason == "a freeze"
    assert document(run("pin", MODEL, "--json")) == {"model": MODEL, "pinned": 1, "generation": 1}
    registry.set_alias(MODEL, "best", 2)
    assert run("pin", MODEL, "best").stdout == "digits is pinned to version 2\n"
    assert "not both" in mistake(run("pin", MODEL, "2", "--remove"))
    assert run("pin", MODEL, "--remove").stdout == "digits is not pinned any more\n"
    assert (registry.state(MODEL).pin, registry.resolve(MODEL)) == (None, 2)
    assert "no version 3" in mistake(run("pin", MODEL, "3"))
    assert "no model 'other'" in mistake(run("pin", "other", "--remove"))


def test_policy(run: Run, registry: Registry, model: Path) -> None:
    registry.publish(MODEL, model)
    assert run("policy", MODEL).stdout.splitlines()[:2] == [
        "strategy                 immediate  (default)",
        "canary_steps             1%:60s 10%:60s 50%:60s  (default)",
    ]
    assert registry.state(MODEL).generation == 0
    arguments = [
        "--strategy", "shadow+canary", "--step", "1%:5m", "--step", "25%:1h", "--watch", "90s", "--min-calls", "7",
        "--shadow-share", "50%", "--allow-op", "ReadFile", "--allow-signature-changes", "--reason", "a test",
    ]  # fmt: skip
    rules = document(run("policy", MODEL, *arguments, "--json"))["policy"]
    assert rules["strategy"] == ["shadow", "canary"]
    assert [(step["share"], step["bake_s"]) for step in rules["canary_steps"]] == [(0.01, 300), (0.25, 3600)]
    policy = registry.state(MODEL).policy
    assert (policy.watch_s, policy.min_calls, policy.shadow_share, policy.allow_ops) == (90, 7, 0.5, ("ReadFile",))
    assert policy.allow_signature_changes
    assert registry.journal(MODEL)[-1].reason == "a test"
    said = run("policy", MODEL, "--refuse-signature-changes").stdout.splitlines()
    assert said[1] == "canary_steps             1%:300s 25%:3600s"
    assert "allow_signature_changes  no  (default)" in said
    assert registry.state(MODEL).policy.min_calls == 7
    assert "(default)" in run("policy", MODEL, "--reset", "--strategy", "manual").stdout.splitlines()[1]
    assert registry.state(MODEL).policy.manual


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "fast"], "'fast' is no strategy"),
        (["--step", "10%"], "'10%' is no step"),
        (["--step", "200%:1s"], "at most 100%"),
        (["--watch", "60"], "'60' is no time: write it such as 60s, 5m or 1h"),
        (["--shadow-share", "0.5"], "'0.5' is no share: write it such as 10%"),
        (["--min-calls", "0"], "min_calls must be in"),
        (["--max-latency-ratio", "nan"], "max_latency_ratio must be in"),
    ],
)
def test_a_policy_that_makes_no_sense_is_a_mistake(
    run: Run, registry: Registry, model: Path, arguments: list[str], message: str
) -> None:
    registry.publish(MODEL, model)
    assert message in mistake(run("policy", MODEL, *arguments))
    assert registry.state(MODEL).generation == 0


def test_the_journal_says_in_short_what_its_json_says_in_full(run: Run, registry: Registry, model: Path) -> None:
    for _ in range(2):
        registry.publish(MODEL, model)
    registry.pin(MODEL, 1, actor="ann", reason="a freeze")
    gates: JSON = [{"gate": "golden", "outcome": "failed", "figures": {"worst": 0.5}}]
    registry.record(MODEL, "rejected", version=2, reason="golden: off", details={"gates": gates, "phase_age_s": 1 / 3})
    pinned, rejected = run("journal", MODEL).stdout.splitlines()[-2:]
    assert "pinned" in pinned
    assert "ann" in pinned
    assert "a freeze" in pinned
    assert "stable=none->1" in pinned
    digest = registry.journal(MODEL)[-2].details["manifest_sha256"]
    assert f"manifest_sha256={str(digest)[:12]}" in pinned.split()
    assert "gates=(1) phase_age_s=0.333333" in rejected
    entries = document(run("journal", MODEL, "--json"))
    assert entries[-1]["details"]["gates"] == gates
    assert (entries[-2]["actor"], entries[-2]["version"], entries[-2]["details"]["manifest_sha256"]) == (
        "ann",
        1,
        digest,
    )


def test_gc(run: Run, registry: Registry, model: Path) -> None:
    for _ in range(4):
        registry.publish(MODEL, model)
    with registry.lease(MODEL, 1):
        planned = document(run("gc", "--keep", "2", "--dry-run", "--json"))
        assert (planned["removed"], planned["leased"]) == ({MODEL: [2]}, {MODEL: [1]})
        assert registry.versions(MODEL) == [1, 2, 3, 4]
        said = run("gc", MODEL, "--keep", "2").stdout
    assert "removed digits version 2" in said
    assert "kept digits version 1: a server holds it" in said
    assert registry.versions(MODEL) == [1, 3, 4]
    assert "at least 1" in mistake(run("gc", "--keep", "0"))


@pytest.mark.parametrize("command", ["publish", "models", "show", "check", "alias", "pin", "policy", "gc", "journal"])
def test_every_command_has_examples(run: Run, command: str) -> None:
    said = run(command, "--help").stdout
    assert f"modelport {command}" in said
    assert "MODELPORT_REGISTRY" in said
