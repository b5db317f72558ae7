"""How a model becomes int8, with a real OpenVINO and a real nncf, and what is said where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from modelport_registry import Golden
from modelport_server.engines.int8 import QuantisingError, Samples, is_quantised, quantise, samples_of
from modelport_server.engines.openvino_engine import import_openvino

FEATURES = 64
X = np.random.default_rng(1).standard_normal((32, FEATURES)).astype(np.float32)
SAMPLES = samples_of([Golden("serving_default", {"x": X}, {"y": X})], ["serving_default"])["serving_default"]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A dense layer, with an input that nothing depends on."""
    openvino = import_openvino()
    ops = openvino.opset13
    given = ops.parameter([-1, FEATURES], np.float32, name="x")
    given.output(0).get_tensor().set_names({"x"})
    weights = np.random.default_rng(2).standard_normal((FEATURES, 8)).astype(np.float32)
    result = ops.relu(ops.matmul(given, ops.constant(weights), transpose_a=False, transpose_b=False))
    result.output(0).get_tensor().set_names({"y"})
    openvino.save_model(openvino.Model([result], [given], "dense"), tmp_path / "dense.xml", compress_to_fp16=False)
    return tmp_path / "dense.xml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def run(model: Any) -> NDArray[np.float32]:
    compiled = import_openvino().Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled({"x": X})["y"])


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Puts something in the place of nncf."""
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "nncf.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand-in"), prepend=":")


def test_a_dense_layer_becomes_int8_and_nothing_is_said_or_sent(
    dense: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # what reports to nncf's makers keeps an id there
    core = import_openvino().Core()
    exact, model = core.read_model(dense), core.read_model(quantise(dense, SAMPLES, folder))
    assert (is_quantised(exact), is_quantised(model)) == (False, True)
    wanted, found = run(exact), run(model)
    assert 1e-4 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    assert capfd.readouterr() == ("", "")
    assert not [*(tmp_path / "home").iterdir()]


def test_inputs_that_nothing_depends_on_are_left_out(dense: Path, folder: Path) -> None:
    samples: Samples = [{**sample, "unused": np.zeros(3, np.int32)} for sample in SAMPLES]
    assert is_quantised(import_openvino().Core().read_model(quantise(dense, samples, folder)))


def test_samples_that_do_not_fit(dense: Path, folder: Path) -> None:
    with pytest.raises(QuantisingError):
        quantise(dense, [{"x": np.zeros((1, FEATURES + 1), np.float32)}], folder)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("raise ModuleNotFoundError(name='nncf')", r"there is no nncf: pip install 'modelport\[int8\]'"),
        ("raise RuntimeError('it is broken')", "^it is broken$"),
        ("raise RuntimeError", "^RuntimeError$"),
        ("import os; os.kill(os.getpid(), 9)", "it ended with status -9"),
        ("import openvino_telemetry", "there is no openvino_telemetry"),
    ],
)
def test_why_it_can_not_be(
    dense: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    code: str,
    text: str,
) -> None:
    stand_in(tmp_path, monkeypatch, code)
    with pytest.raises(QuantisingError, match=text):
        quantise(dense, SAMPLES, folder)
    assert capfd.readouterr() == ("", "")


def test_samples_are_all_rows_of_all_examples() -> None:
    golden = [
        Golden("rows", {"a": X[:3], "b": np.arange(3)}, {"y": X[:3]}),
        Golden("whole", {"a": X[:3]}, {"y": X[:3]}),
        Golden("rows", {"a": X[3:4], "b": np.arange(3, 4)}, {"y": X[:1]}),
    ]
    samples = samples_of(golden, ["rows"])
    assert [sample["a"].shape for sample in samples["whole"]] == [(3, FEATURES)]
    assert [int(sample["b"][0]) for sample in samples["rows"]] == [0, 1, 2, 3]
    np.testing.assert_array_equal(np.concatenate([sample["a"] for sample in samples["rows"]]), X[:4])
