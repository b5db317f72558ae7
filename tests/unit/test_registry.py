from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modelport_registry
from modelport_registry import (
    AlreadyExistsError,
    ConflictError,
    Golden,
    IntegrityError,
    InvalidModelError,
    Lineage,
    Manifest,
    NotFoundError,
    Registry,
    RegistryError,
    State,
    _publish,
    transitions,
)
from tests.support.saved_models import ROW_DOUBLER, SERVING_DEFAULT, saved_model_bytes, write_fake_saved_model

MODEL = "digits"


UNUSABLE: list[tuple[Callable[[Path], object], str]] = [
    (lambda m: (m / "link").symlink_to("saved_model.pb"), "a symbolic link"),
    (lambda m: (m / "dir").symlink_to("variables"), "a symbolic link"),
    (lambda m: (m / "gone").symlink_to("nowhere"), "a symbolic link"),
    (lambda m: os.mkfifo(m / "variables" / "pipe"), "a FIFO"),
    (lambda m: (m / "new\nline").write_text(""), "not a usable file name"),
    (lambda m: (m / "back\\slash").write_text(""), "not a usable file name"),
    (lambda m: Path(os.fsdecode(bytes(m) + b"/\xff")).write_text(""), "not a usable file name"),
    (lambda m: (m / "manifest.json").write_text("{}"), "modelport writes itself"),
    (lambda m: (m / "golden.npz").write_text(""), "modelport writes itself"),
    (lambda m: (m / "saved_model.pb").unlink(), "holds no saved_model.pb"),
    (lambda m: (m / "saved_model.pb").write_bytes(b"\xff" * 9), "damaged or not a SavedModel"),
    (lambda m: (m / "/".join("d" * 40)).mkdir(parents=True), "nested more than"),
]
CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda v: (v / "saved_model.pb").unlink(), "'saved_model.pb' is missing"),
    (lambda v: (v / "golden.npz").unlink(), "'golden.npz' is missing"),
    (lambda v: os.truncate(v / "variables" / "variables.index", 4), "has 4 bytes, 5 were published"),
    (lambda v: os.truncate(v / "variables" / "variables.index", 6), "has 6 bytes, 5 were published"),
    (lambda v: os.truncate(v / "manifest.json", 100), "the manifest is damaged"),
    (lambda v: os.truncate(v / "manifest.json", 0), "the manifest is damaged"),
    (lambda v: (v / "extra").write_text(""), "'extra' was not published"),
    (lambda v: (v / "variables" / "extra").write_text(""), "'variables/extra' was not published"),
    (lambda v: (v / "assets").mkdir(), "'assets' was not published"),
    (lambda v: (v.parent / "elsewhere").hardlink_to(v / "saved_model.pb"), "is hard-linked"),
    (lambda v: (v.parent / "elsewhere").hardlink_to(v / "manifest.json"), "is hard-linked"),
    (lambda v: (v / "extra").symlink_to("saved_model.pb"), "'extra' is a symbolic link"),
    (lambda v: os.mkfifo(v / "extra"), "'extra' is a FIFO"),
    (lambda v: (v / "variables").rename(v / "assets"), "'assets' was not published"),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_fake_saved_model(tmp_path / "model")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def publish(registry: Registry, model: Path) -> Callable[..., int]:
    def run(**options: Any) -> int:
        return registry.publish(MODEL, model, **options).version

    return run


def golden(**changes: Any) -> Golden:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    fields: dict[str, Any] = {"signature": SERVING_DEFAULT, "inputs": {"x": x}, "outputs": {"y": x * 2}, **changes}
    return Golden(**fields)


def test_the_public_names_are_these() -> None:
    assert modelport_registry.__all__ == [
        "JSON",
        "AlreadyExistsError",
        "ConflictError",
        "Ended",
        "FileEntry",
        "GarbageReport",
        "Golden",
        "GraphFunction",
        "GraphNode",
        "IntegrityError",
        "InvalidModelError",
        "JournalEntry",
        "Lineage",
        "Manifest",
        "MetaGraph",
        "NotFoundError",
        "Phase",
        "Published",
        "Registry",
        "RegistryError",
        "Rejection",
        "Rollout",
        "RolloutPolicy",
        "SignatureSpec",
        "State",
        "Step",
        "StepKind",
        "Strategy",
        "TensorSpec",
        "check_server",
        "parse_step",
        "parse_strategy",
        "read_graph",
        "read_signatures",
        "transitions",
        "wait_until_stable",
        "with_signature",
    ]


class TestPublish:
    def test_everything_published_comes_back(self, registry: Registry, model: Path, tmp_path: Path) -> None:
        report = tmp_path / "report"
        (report / "plots").mkdir(parents=True)
        (report / "plots" / "loss.png").write_bytes(b"png")
        lineage = Lineage("ab" * 32, {"epochs": 10, "layers": [{"units": 3}], "seed": None}, "c0ffee", "a notebook")
        before = datetime.now(UTC)
        published = registry.publish(
            MODEL, model, golden=[golden()], metrics={"accuracy": 1}, lineage=lineage, tags=["a"], report=report
        )
        manifest = published.manifest
        assert (published.model, published.version) == (MODEL, 1)
        assert published.path == registry.path(MODEL, 1) == tmp_path / "registry" / MODEL / "1"
        assert published.warnings == ()
        assert registry.manifest(MODEL, 1) == registry.verify(MODEL, 1) == manifest
        assert manifest.lineage == lineage
        assert manifest.metrics == {"accuracy": 1.0}
        assert manifest.golden == 3
        assert manifest.tags == ("a",)
        assert before <= manifest.created <= datetime.now(UTC)
        assert [entry.path for entry in manifest.files] == [
            "golden.npz",
            "report/plots/loss.png",
            "saved_model.pb",
            "variables/variables.data-00000-of-00001",
            "variables/variables.index",
        ]
        assert manifest.size_bytes == sum(p.stat().st_size for p in published.path.rglob("*") if p.is_file()) - (
            (published.path / "manifest.json").stat().st_size
        )
        assert (published.path / "saved_model.pb").read_bytes() == (model / "saved_model.pb").read_bytes()
        loaded = registry.golden(MODEL, 1)
        assert np.array_equal(loaded[0].outputs["y"], golden().outputs["y"])

    def test_without_golden_examples_it_warns(self, registry: Registry, model: Path) -> None:
        published = registry.publish(MODEL, model)
        assert "no golden examples" in published.warnings[0]
        assert registry.golden(MODEL, 1) == []

    def test_numbers_go_up(self, registry: Registry, publish: Callable[..., int]) -> None:
        assert [publish(), publish(), publish(version=7), publish(), publish(version=4)] == [1, 2, 7, 8, 4]
        assert registry.versions(MODEL) == [1, 2, 4, 7, 8]

    def test_a_taken_number_is_refused(self, registry: Registry, publish: Callable[..., int]) -> None:
        publish(version=3)
        (registry.root / MODEL / "5").mkdir()
        for version in (3, 5):
            with pytest.raises(AlreadyExistsError, match=f"already has a version {version}"):
                publish(version=version)
        assert publish() == 6

    def test_the_last_number_can_be_used_once(self, registry: Registry, publish: Callable[..., int]) -> None:
        assert publish(version=2**63 - 1) == 2**63 - 1
        with pytest.raises(RegistryError, match="no version number left"):
            publish()
        assert registry.resolve(MODEL) == 2**63 - 1

    @pytest.mark.parametrize("version", [0, -1, 2**63])
    def test_numbers_out_of_range_are_refused(self, publish: Callable[..., int], version: int) -> None:
        with pytest.raises(RegistryError, match="not a version number"):
            publish(version=version)

    def test_a_folder_made_by_hand_meanwhile_is_never_written_into(
        self, registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the look for a free number and the rename, someone copies a folder in."""
        registry.publish(MODEL, model)
        renamed: list[Path] = []
        rename = Path.rename

        def late(self: Path, target: Path) -> Path:
            if not renamed:
                target.mkdir()
                (target / "half.pb").write_bytes(b"half")
            renamed.append(target)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", late)
        assert registry.publish(MODEL, model).version == 3
        assert registry.versions(MODEL) == [1, 3]
        assert registry.verify(MODEL, 3).version == 3
        assert [path.name for path in (registry.root / MODEL / "2").iterdir()] == ["half.pb"]

    def test_progress_counts_every_byte(self, registry: Registry, tmp_path: Path) -> None:
        model = write_fake_saved_model(tmp_path / "big", variables=bytes(3_000_000))
        seen: list[tuple[int, int]] = []
        registry.publish(MODEL, model, on_progress=lambda done, total: seen.append((done, total)))
        total = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
        assert seen[-1] == (total, total)
        assert len(seen) >= 5
        assert sorted(seen) == seen

    def test_a_progress_that_raises_leaves_nothing(self, registry: Registry, model: Path) -> None:
        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            registry.publish(MODEL, model, on_progress=stop)
        assert registry.models() == []
        assert list((registry.root / MODEL / ".staging").iterdir()) == []

    def test_a_model_that_changes_while_it_is_copied_is_refused(self, registry: Registry, model: Path) -> None:
        (model / "assets").mkdir()
        (model / "assets" / "vocabulary.txt").write_text("a\nb\n")  # is copied first

        def change(done: int, total: int) -> None:
            (model / "saved_model.pb").write_bytes(saved_model_bytes({"other": ROW_DOUBLER[SERVING_DEFAULT]}))

        with pytest.raises(InvalidModelError, match="changed while it was copied"):
            registry.publish(MODEL, model, on_progress=change)
        assert registry.models() == []

    def test_aliases_move_with_the_publish(self, registry: Registry, publish: Callable[..., int]) -> None:
        publish(aliases=["stable", "best"])
        publish(aliases=["best"])
        assert registry.state(MODEL) == State(2, {"stable": 1, "best": 2}, pin=1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"metrics": {"loss": float("nan")}}, "the metric 'loss' is nan"),
            ({"metrics": {"loss": float("inf")}}, "metrics are finite"),
            ({"aliases": ["Best"]}, "not an alias"),
            ({"aliases": ["12"]}, "looks like a version number"),
            ({"report": Path("/nowhere")}, "the report '/nowhere' is not a folder"),
            ({"lineage": Lineage(parameters={"x": object()})}, "parameters must be JSON"),  # type: ignore[dict-item]
        ],
    )
    def test_a_mistake_is_one_line_and_touches_nothing(
        self, registry: Registry, publish: Callable[..., int], options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RegistryError, match=message) as caught:
            publish(**options)
        assert "\n" not in str(caught.value)
        assert not registry.root.exists()

    @pytest.mark.parametrize("name", ["", "../x", "a/b", "..", "A", "a" * 65, "a\0", "ä", "-a", "%2e"])
    def test_illegal_model_names_are_refused(self, registry: Registry, model: Path, name: str) -> None:
        with pytest.raises(RegistryError, match="is not a model name"):
            registry.publish(name, model)
        with pytest.raises(RegistryError, match="is not a model name"):
            registry.resolve(name)
        assert not registry.exists(name)
        assert not registry.root.exists()

    @pytest.mark.parametrize(("make", "message"), UNUSABLE)
    def test_folders_that_are_no_plain_saved_model_are_refused(
        self, registry: Registry, model: Path, make: Callable[[Path], object], message: str
    ) -> None:
        make(model)
        with pytest.raises(InvalidModelError, match=message) as caught:
            registry.publish(MODEL, model)
        assert "\n" not in str(caught.value)
        assert not registry.root.exists()

    def test_a_socket_is_refused(self, registry: Registry, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(model)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
            with pytest.raises(InvalidModelError, match="a socket"):
                registry.publish(MODEL, model)

    def test_a_missing_folder_is_refused(self, registry: Registry, tmp_path: Path) -> None:
        with pytest.raises(InvalidModelError, match="is not a folder"):
            registry.publish(MODEL, tmp_path / "nowhere")

    def test_a_root_that_is_a_file_is_a_clear_error(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(RegistryError, match="can't publish digits: "):
            Registry(tmp_path / "file").publish(MODEL, model)


class TestGolden:
    X = np.ones((3, 4), np.float32)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"signature": "other"}, "for the signature 'other', the model has: 'serving_default'"),
            ({"inputs": {}}, "lack the input 'x'"),
            ({"inputs": {"x": X, "z": X}}, "have the input 'z'"),
            ({"outputs": {"z": X}}, "have the output 'z'"),
            ({"outputs": {}}, "no outputs"),
            ({"inputs": {"x": X.astype(np.float64)}}, "input 'x' is float64, the signature says float32"),
            ({"outputs": {"y": X.astype(np.complex64)}}, "output 'y' is complex64"),
            ({"inputs": {"x": X[0]}}, r"shape \[4\], the signature says \[any, 4\]"),
            ({"inputs": {"x": X[:, :3]}}, r"shape \[3, 3\], the signature says \[any, 4\]"),
            ({"outputs": {"y": X[:2]}}, "output 'y' has 2 rows, input 'x' has 3"),
            ({"inputs": {"x": X[:0]}, "outputs": {"y": X[:0]}}, "no rows"),
            ({"outputs": {"y": X * np.nan}}, "holds NaN"),
            ({"rtol": -1.0}, "tolerances"),
            ({"atol": float("nan")}, "tolerances"),
        ],
    )
    def test_examples_that_do_not_fit_are_refused(
        self, registry: Registry, model: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InvalidModelError, match=message):
            registry.publish(MODEL, model, golden=[golden(**changes)])
        assert not registry.root.exists()

    def test_signatures_without_a_batch_have_one_example_a_call(self, registry: Registry, tmp_path: Path) -> None:
        model = write_fake_saved_model(
            tmp_path / "m", {"f": ({"a": ("float32", [3, 3])}, {"d": ("float32", []), "any": ("string", None)})}
        )
        one = Golden("f", {"a": np.eye(3, dtype=np.float32)}, {"d": np.float32(1.0)})  # type: ignore[dict-item]
        two = Golden("f", {"a": np.eye(3, dtype=np.float32)}, {"any": np.array([["a"]])}, rtol=0.0)
        assert registry.publish(MODEL, model, golden=[one, two]).manifest.golden == 2
        loaded = registry.golden(MODEL, 1)
        assert loaded[0].outputs["d"].shape == ()
        assert loaded[1].outputs["any"].tolist() == [[b"a"]]
        assert [one.rtol for one in loaded] == [1e-4, 0.0]

    def test_big_endian_and_strided_arrays_are_stored_alike(self, registry: Registry, model: Path) -> None:
        x = np.arange(24, dtype=">f4").reshape(3, 8)[:, ::2]
        registry.publish(MODEL, model, golden=[golden(inputs={"x": x})])
        assert np.array_equal(registry.golden(MODEL, 1)[0].inputs["x"], x)


class TestReading:
    def test_a_registry_that_is_not_there_is_empty(self, registry: Registry) -> None:
        assert registry.models() == []
        assert registry.versions(MODEL) == []
        assert registry.state(MODEL) == State()
        assert registry.journal(MODEL) == []
        assert not registry.exists(MODEL)
        for missing in (registry.resolve, registry.remove_alias):
            with pytest.raises(NotFoundError, match=f"no model '{MODEL}'"):
                missing(MODEL, alias="stable")
        with pytest.raises(NotFoundError, match=f"no model '{MODEL}'"):
            registry.record(MODEL, "look")
        with pytest.raises(NotFoundError, match=f"no model '{MODEL}'"):
            registry.collect_garbage(MODEL)
        assert not registry.root.exists()

    def test_only_proper_numbers_with_a_manifest_are_versions(
        self, registry: Registry, publish: Callable[..., int], tmp_path: Path
    ) -> None:
        publish()
        folder = registry.root / MODEL
        manifest = (folder / "1" / "manifest.json").read_text()
        for name in ("007", "+3", "3.tmp", "0", "-1", "٣", " 4", "1_0", str(2**63), "v2", "half"):
            (folder / name).mkdir()
            (folder / name / "manifest.json").write_text(manifest)
        (folder / "11").mkdir()  # half copied
        (folder / "12").write_text("a file")
        (folder / "13").symlink_to(folder / "1")
        (folder / "14").mkdir()
        (folder / "14" / "manifest.json").symlink_to(folder / "1" / "manifest.json")
        assert registry.versions(MODEL) == [1]
        assert registry.resolve(MODEL) == 1
        registry.collect_garbage(keep=1, staging_age_s=0)
        assert (folder / "11").is_dir()
        assert publish() == 15

    def test_a_folder_copied_in_by_hand_is_no_version_before_its_manifest_is_there(
        self, registry: Registry, publish: Callable[..., int], model: Path, tmp_path: Path
    ) -> None:
        publish()
        copied = Registry(tmp_path / "other").publish(MODEL, model, golden=[golden()], version=5).path
        files = sorted(path.relative_to(copied) for path in copied.rglob("*") if path.is_file())
        assert files[-1] != Path("manifest.json")
        for path in files:
            target = registry.root / MODEL / "5" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if Path("manifest.json") == path:
                continue
            target.write_bytes((copied / path).read_bytes())
            assert registry.versions(MODEL) == [1]
            assert transitions.candidate(registry.state(MODEL), registry.versions(MODEL)) == 1
            assert registry.resolve(MODEL) == 1
            assert registry.collect_garbage(MODEL, keep=1, staging_age_s=0).removed == {}
        (registry.root / MODEL / "5" / "manifest.json").write_bytes((copied / "manifest.json").read_bytes())
        assert registry.versions(MODEL) == [1, 5]
        registry.verify(MODEL, 5)

    def test_a_folder_whose_manifest_was_copied_too_early_is_not_whole(
        self, registry: Registry, publish: Callable[..., int], model: Path, tmp_path: Path
    ) -> None:
        publish()
        copied = Registry(tmp_path / "other").publish(MODEL, model, golden=[golden()], version=5).path
        files = sorted(path.relative_to(copied) for path in copied.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path != Path("manifest.json")):
            if (registry.root / MODEL / "5").exists():
                with pytest.raises(IntegrityError, match="is missing"):
                    registry.verify(MODEL, 5)
            target = registry.root / MODEL / "5" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((copied / path).read_bytes())
        registry.verify(MODEL, 5)

    def test_other_folders_are_no_models(self, registry: Registry, publish: Callable[..., int]) -> None:
        publish()
        (registry.root / "empty").mkdir()
        (registry.root / "lost+found").mkdir()
        (registry.root / "file").write_text("")
        assert registry.models() == [MODEL]
        assert registry.collect_garbage().removed == {}

    def test_resolve(self, registry: Registry, publish: Callable[..., int]) -> None:
        for _ in range(3):
            publish()
        assert registry.resolve(MODEL) == 3
        registry.set_alias(MODEL, "stable", 2)
        registry.set_alias(MODEL, "canary", 3)
        assert registry.resolve(MODEL) == 2
        assert registry.resolve(MODEL, alias="canary") == 3
        assert registry.resolve(MODEL, version=1) == 1
        with pytest.raises(NotFoundError, match="digits has no version 9; the highest is 3"):
            registry.resolve(MODEL, version=9)
        with pytest.raises(NotFoundError, match="no alias 'best'; it has: 'canary', 'stable'"):
            registry.resolve(MODEL, alias="best")
        with pytest.raises(RegistryError, match="not both"):
            registry.resolve(MODEL, version=1, alias="stable")

    def test_a_version_copied_by_hand_says_that_it_is_another(
        self, registry: Registry, publish: Callable[..., int]
    ) -> None:
        publish()
        (registry.root / MODEL / "1").rename(registry.root / MODEL / "2")
        with pytest.raises(IntegrityError, match="digits version 2: the manifest is that of digits version 1"):
            registry.manifest(MODEL, 2)

    def test_the_clock_does_not_matter(
        self, registry: Registry, publish: Callable[..., int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for days in (0, -1, 3650, -3650):

            class Clock(datetime):
                @classmethod
                def now(cls, tz: Any = None) -> Any:
                    return datetime.now(tz) + timedelta(days=days)  # noqa: B023

            monkeypatch.setattr(_publish, "datetime", Clock)
            number = publish()
            moment = (datetime.now(UTC) + timedelta(days=days)).timestamp()
            os.utime(registry.path(MODEL, number), (moment, moment))
        years = [registry.manifest(MODEL, version).created.year for version in registry.versions(MODEL)]
        assert sorted(years) != years
        assert transitions.candidate(registry.state(MODEL), registry.versions(MODEL)) == registry.versions(MODEL)[-1]
        assert registry.versions(MODEL) == [1, 2, 3, 4]
        assert registry.resolve(MODEL) == 4
        assert registry.collect_garbage(keep=2).removed == {MODEL: (1, 2)}


class TestManifest:
    @pytest.fixture
    def manifest(self, registry: Registry, publish: Callable[..., int]) -> Manifest:
        publish(golden=[golden()], metrics={"loss": 0.00001})
        return registry.manifest(MODEL, 1)

    def rewritten(self, manifest: Manifest, **changes: Any) -> str:
        """Returns the manifest with other fields and the right digest."""
        document = {**json.loads(manifest.to_json()), **changes, "sha256": "0" * 64}
        text = json.dumps(document)
        return text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1)

    def test_unknown_fields_are_ignored(self, manifest: Manifest) -> None:
        assert Manifest.from_json(self.rewritten(manifest, novelty={"a": [1]})) == manifest

    def test_a_newer_format_is_refused_whatever_it_looks_like(self) -> None:
        with pytest.raises(IntegrityError, match="format 2, this modelport reads up to 1: upgrade"):
            Manifest.from_json('{"format": 2}')

    @pytest.mark.parametrize(
        "changes",
        [
            {"version": 0},
            {"version": 2**63},
            {"version": True},
            {"version": "1"},
            {"model": "../x"},
            {"created": "yesterday"},
            {"created": "2026-01-01T00:00:00"},
            {"files": None},
            {"files": [{"path": "../x", "size": 1, "sha256": "0" * 64}]},
            {"files": [{"path": "/etc/passwd", "size": 1, "sha256": "0" * 64}]},
            {"files": [{"path": "a//b", "size": 1, "sha256": "0" * 64}]},
            {"files": [{"path": "a\u0000b", "size": 1, "sha256": "0" * 64}]},
            {"files": [{"path": "a", "size": -1, "sha256": "0" * 64}]},
            {"files": [{"path": "a", "size": 1, "sha256": "X" * 64}]},
            {"files": [{"path": "a", "size": 1, "sha256": "0" * 64}] * 2},
            {"metrics": {"loss": "low"}},
            {"metrics": {"loss": 10**400}},
            {"golden": -1},
            {"golden": 1.5},
            {"signatures": {"f": {"inputs": [], "outputs": [{"name": "y", "dtype": "bool", "shape": [-1]}]}}},
            {"signatures": {"f": []}},
            {"tags": [1]},
            {"lineage": None},
        ],
    )
    def test_wrong_fields_are_refused(self, manifest: Manifest, changes: dict[str, Any]) -> None:
        with pytest.raises(IntegrityError, match="is missing or wrong") as caught:
            Manifest.from_json(self.rewritten(manifest, **changes))
        assert len(str(caught.value)) < 200

    @pytest.mark.parametrize(
        "text",
        ["", "[]", "null", "{", '{"format": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, '{"a": ' * 100_000, "\ud800"],
    )
    def test_what_is_no_strict_json_is_refused(self, text: str) -> None:
        with pytest.raises(IntegrityError, match="the manifest is damaged"):
            Manifest.from_json(text.encode(errors="surrogatepass"))

    def test_every_bit_counts(self, manifest: Manifest) -> None:
        data = bytearray(manifest.to_json().encode())
        for index in range(len(data)):
            for bit in range(8):
                data[index] ^= 1 << bit
                with pytest.raises(IntegrityError):
                    Manifest.from_json(bytes(data))
                data[index] ^= 1 << bit
        assert Manifest.from_json(bytes(data)) == manifest

    def test_a_manifest_too_large_is_not_read(self, registry: Registry, manifest: Manifest) -> None:
        path = registry.path(manifest.model, 1) / "manifest.json"
        os.truncate(path, (16 << 20) + 1)
        with pytest.raises(IntegrityError, match="more than 16777216 bytes"):
            registry.manifest(MODEL, 1)


class TestVerify:
    @pytest.fixture
    def version(self, registry: Registry, publish: Callable[..., int]) -> Path:
        publish(golden=[golden()])
        return registry.path(MODEL, 1)

    def test_a_bit_flipped_anywhere_is_noticed(self, registry: Registry, version: Path) -> None:
        for path in [path for path in version.rglob("*") if path.is_file()]:
            whole = path.read_bytes()
            for index in range(len(whole)):
                flipped = whole[index] ^ (1 << index % 8)
                path.write_bytes(whole[:index] + bytes([flipped]) + whole[index + 1 :])
                with pytest.raises(IntegrityError, match="digits version 1: "):
                    registry.verify(MODEL, 1)
            path.write_bytes(whole)
        registry.verify(MODEL, 1)

    @pytest.mark.parametrize(("change", "message"), CHANGES)
    def test_what_is_not_as_published_is_noticed(
        self, registry: Registry, version: Path, change: Callable[[Path], object], message: str
    ) -> None:
        change(version)
        with pytest.raises(IntegrityError, match=message) as caught:
            registry.verify(MODEL, 1)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["saved_model.pb", "variables/variables.index", "variables", "golden.npz"])
    @pytest.mark.parametrize("kind", ["symlink", "fifo", "folder", "socket"])
    def test_what_takes_a_files_place_is_never_opened(
        self, registry: Registry, version: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = version / name
        away = registry.root / "away"
        path.rename(away)
        monkeypatch.chdir(path.parent)
        if kind == "symlink":
            path.symlink_to(away)
        elif kind == "fifo":
            os.mkfifo(path)  # to open it would wait for ever
        elif kind == "folder":
            path.mkdir()
        else:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        with pytest.raises(IntegrityError):
            registry.verify(MODEL, 1)

    def test_a_device_is_never_opened(self, registry: Registry, version: Path) -> None:
        try:
            os.mknod(version / "extra", 0o20666, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("only root makes devices")
        with pytest.raises(IntegrityError, match="is a device"):
            registry.verify(MODEL, 1)

    def test_a_manifest_that_is_a_fifo_or_link_is_no_manifest(self, registry: Registry, version: Path) -> None:
        (version / "manifest.json").unlink()
        os.mkfifo(version / "manifest.json")
        assert registry.versions(MODEL) == []
        with pytest.raises(NotFoundError):
            registry.verify(MODEL, 1)

    def test_a_golden_file_that_is_a_fifo_is_refused(self, registry: Registry, version: Path) -> None:
        (version / "golden.npz").unlink()
        os.mkfifo(version / "golden.npz")
        with pytest.raises(IntegrityError, match="not a plain file"):
            registry.golden(MODEL, 1)


class TestState:
    def test_aliases_change_by_compare_and_swap(self, registry: Registry, publish: Callable[..., int]) -> None:
        publish()
        publish()
        assert registry.set_alias(MODEL, "stable", 1) == State(1, {"stable": 1}, pin=1)
        assert registry.set_alias(MODEL, "stable", 2, expected_generation=1) == State(2, {"stable": 2}, pin=2)
        with pytest.raises(ConflictError, match="generation 2, not 1"):
            registry.set_alias(MODEL, "stable", 1, expected_generation=1)
        with pytest.raises(ConflictError):
            registry.remove_alias(MODEL, "stable", expected_generation=1)
        assert registry.remove_alias(MODEL, "stable", expected_generation=2) == State(3)
        assert registry.state(MODEL) == State(3)
        with pytest.raises(NotFoundError, match="no alias 'stable'; it has: none"):
            registry.remove_alias(MODEL, "stable")

    def test_an_alias_needs_a_version(self, registry: Registry, publish: Callable[..., int]) -> None:
        publish()
        with pytest.raises(NotFoundError):
            registry.set_alias(MODEL, "stable", 2)
        for alias in ("", "../x", "7", "Stable"):
            with pytest.raises(RegistryError, match="is not an alias"):
                registry.set_alias(MODEL, alias, 1)

    def test_fields_of_others_are_kept(self, registry: Registry, publish: Callable[..., int]) -> None:
        publish()
        path = registry.root / MODEL / "state.json"
        path.write_text('{"format": 1, "generation": 5, "aliases": {}, "collected": 0, "weather": {"bake_s": 60}}')
        registry.set_alias(MODEL, "stable", 1)
        kept = json.loads(path.read_text())
        assert (kept["generation"], kept["aliases"], kept["weather"]) == (6, {"stable": 1}, {"bake_s": 60})

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{}",
            '{"format": 2}',
            '{"format": 1, "generation": -1, "aliases": {}, "collected": 0}',
            '{"format": 1, "generation": 0, "aliases": {"a": 0}, "collected": 0}',
            '{"format": 1, "generation": 0, "aliases": {"a": 9223372036854775808}, "collected": 0}',
        ],
    )
    def test_a_damaged_state_is_never_guessed(self, registry: Registry, publish: Callable[..., int], text: str) -> None:
        publish()
        (registry.root / MODEL / "state.json").write_text(text)
        for act in (
            lambda: registry.state(MODEL),
            lambda: registry.resolve(MODEL),
            publish,
            lambda: registry.set_alias(MODEL, "stable", 1),
            lambda: registry.collect_garbage(MODEL),
        ):
            with pytest.raises(IntegrityError):
                act()
        assert registry.versions(MODEL) == [1]


class TestJournal:
    def test_says_what_was_done(self, registry: Registry, publish: Callable[..., int]) -> None:
        before = datetime.now(UTC)
        publish()
        publish()
        registry.set_alias(MODEL, "stable", 2)
        registry.record(MODEL, "reject", version=1, reason="golden", details={"worst": 0.5})
        registry.remove_alias(MODEL, "stable")
        registry.collect_garbage(keep=1)
        entries = registry.journal(MODEL)
        assert [(entry.action, entry.version) for entry in entries] == [
            ("publish", 1),
            ("publish", 2),
            ("alias", 2),
            ("reject", 1),
            ("unalias", 2),
            ("collect", 1),
        ]
        assert (entries[3].reason, entries[3].details) == ("golden", {"worst": 0.5})
        assert all(before <= entry.time <= datetime.now(UTC) and "@" in entry.actor for entry in entries)

    @pytest.mark.parametrize("torn", ['{"time": "20', "\x00\x00", "garbage", '{"time": 1}', "\ud800"])
    def test_a_torn_line_costs_no_other(self, registry: Registry, publish: Callable[..., int], torn: str) -> None:
        publish()
        with (registry.root / MODEL / "journal.jsonl").open("ab") as file:
            file.write(torn.encode(errors="surrogatepass"))
        registry.record(MODEL, "after")
        assert [entry.action for entry in registry.journal(MODEL)] == ["publish", "after"]

    def test_text_with_line_ends_stays_on_its_line(self, registry: Registry, publish: Callable[..., int]) -> None:
        publish()
        registry.record(MODEL, "look", reason="a\nb\u2028c\x85d\r", details={"\n": "\n"})
        registry.record(MODEL, "after")
        entries = registry.journal(MODEL)
        assert [entry.action for entry in entries] == ["publish", "look", "after"]
        assert entries[1].reason == "a\nb\u2028c\x85d\r"

    def test_what_is_no_line_is_refused(self, registry: Registry, publish: Callable[..., int]) -> None:
        publish()
        with pytest.raises(RegistryError, match="at most 65536 bytes"):
            registry.record(MODEL, "look", reason="x" * 70_000)
        with pytest.raises(RegistryError, match="must be JSON"):
            registry.record(MODEL, "look", details={"x": float("nan")})
        assert len(registry.journal(MODEL)) == 1


class TestGarbage:
    def test_keeps_the_highest_the_aliased_and_the_leased(
        self, registry: Registry, publish: Callable[..., int]
    ) -> None:
        for _ in range(6):
            publish(golden=[golden()])
        registry.set_alias(MODEL, "stable", 2)
        size = sum(path.stat().st_size for path in registry.path(MODEL, 1).rglob("*") if path.is_file())
        with registry.lease(MODEL, 3), registry.lease(MODEL, 3):
            planned = registry.collect_garbage(keep=2, dry_run=True)
            assert registry.versions(MODEL) == [1, 2, 3, 4, 5, 6]
            report = registry.collect_garbage(keep=2)
        assert report.removed == planned.removed == {MODEL: (1, 4)}
        assert report.leased == planned.leased == {MODEL: (3,)}
        assert report.freed_bytes == planned.freed_bytes >= 2 * size
        assert (planned.dry_run, report.dry_run, report.leftovers) == (True, False, 0)
        assert registry.versions(MODEL) == [2, 3, 5, 6]
        assert registry.collect_garbage(keep=2).removed == {MODEL: (3,)}
        assert registry.collect_garbage(keep=2).removed == {}

    def test_a_lease_of_what_is_gone_is_refused(self, registry: Registry, publish: Callable[..., int]) -> None:
        publish()
        publish()
        registry.collect_garbage(keep=1)
        with pytest.raises(NotFoundError), registry.lease(MODEL, 1):
            pass
        assert [path.name for path in (registry.root / MODEL / ".leases").iterdir()] == ["2"]

    def test_a_lease_ends_with_its_block_even_by_an_error(
        self, registry: Registry, publish: Callable[..., int]
    ) -> None:
        publish()
        publish()
        with pytest.raises(ZeroDivisionError), registry.lease(MODEL, 1):
            raise ZeroDivisionError
        assert registry.collect_garbage(keep=1).removed == {MODEL: (1,)}

    def test_a_collected_number_is_never_used_again(self, registry: Registry, publish: Callable[..., int]) -> None:
        for version in (1, 2, 5):
            publish(version=version)
        registry.set_alias(MODEL, "stable", 1)
        registry.collect_garbage(keep=1)
        assert registry.versions(MODEL) == [1, 5]
        assert registry.state(MODEL).collected == 2
        with pytest.raises(AlreadyExistsError, match="never used again: use one above 2"):
            publish(version=2)
        assert publish(version=3) == 3
        (registry.root / MODEL / "5").rename(registry.root / "away")
        (registry.root / MODEL / "3").rename(registry.root / "away3")
        assert publish() == 3  # what people move away by hand is not known here
        registry.collect_garbage(keep=1)
        assert publish() == 4

    def test_a_living_publisher_is_left_alone(self, registry: Registry, model: Path) -> None:
        registry.publish(MODEL, model)
        reports: list[int] = []

        def collect(done: int, total: int) -> None:
            reports.append(registry.collect_garbage(staging_age_s=0).leftovers)

        assert registry.publish(MODEL, model, on_progress=collect).version == 2
        assert set(reports) == {0}
        registry.verify(MODEL, 2)

    def test_leftovers_go_when_they_are_old(self, registry: Registry, publish: Callable[..., int]) -> None:
        publish()
        leftover = registry.root / MODEL / ".staging" / "dead"
        (leftover / "version").mkdir(parents=True)
        (leftover / "version" / "saved_model.pb").write_bytes(bytes(1000))
        assert registry.collect_garbage().leftovers == 0
        report = registry.collect_garbage(staging_age_s=0, dry_run=True)
        assert (report.leftovers, report.freed_bytes >= 1000, leftover.exists()) == (1, True, True)
        assert registry.collect_garbage(staging_age_s=0).leftovers == 1
        assert not leftover.exists()

    def test_at_least_one_version_stays(self, registry: Registry, publish: Callable[..., int]) -> None:
        publish()
        for keep in (0, -1):
            with pytest.raises(RegistryError, match="at least 1"):
                registry.collect_garbage(keep=keep)
        assert registry.versions(MODEL) == [1]
