"""TensorFlow runs what people export: in a session, and eagerly what a session would not compute alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelport_server.engines.protocol import EngineError
from modelport_server.engines.tensorflow_engine import TensorFlowEngine, import_tensorflow

tf = import_tensorflow()
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def _save(path: Path, module: Any, function: Callable[..., Any], *specs: Any) -> None:
    traced = tf.function(function, input_signature=specs, autograph=False)
    tf.saved_model.save(module, str(path), signatures=traced.get_concrete_function())


def _loaded(path: Path, signature: str = "serving_default") -> TensorFlowEngine:
    engine = TensorFlowEngine()
    engine.load(path, [signature])
    return engine


def test_a_model_with_variables_runs_in_a_session(tmp_path: Path) -> None:
    module = tf.Module()
    module.weights = tf.Variable(np.full((4, 3), 0.5, np.float32))

    def answer(x: Any) -> dict[str, Any]:
        return {"y": x @ module.weights, "same": x, "again": tf.identity(x)}

    _save(tmp_path, module, answer, tf.TensorSpec([None, 4], tf.float32, name="x"))
    engine = _loaded(tmp_path)
    outputs = engine.run("serving_default", {"x": X})
    assert "eagerly" not in engine.name
    np.testing.assert_allclose(outputs["y"], np.repeat(X.sum(axis=1, keepdims=True) / 2, 3, axis=1))
    np.testing.assert_array_equal(outputs["same"], X)
    np.testing.assert_array_equal(outputs["again"], X)


def test_a_gpu_would_compute_in_float32_and_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_FORCE_GPU_ALLOW_GROWTH", "")  # so that it is as before in the end
    monkeypatch.delenv("TF_FORCE_GPU_ALLOW_GROWTH")
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(True)
    try:
        engine = TensorFlowEngine()
        assert not tf.config.experimental.tensor_float_32_execution_enabled()
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)
    assert os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"

    def devices(kind: str) -> list[str]:
        return [kind] if kind == "GPU" else []

    monkeypatch.setattr(tf.config, "list_logical_devices", devices)
    assert engine.name == f"tensorflow {tf.__version__} on GPU"


def test_tables_and_texts_run_in_a_session(tmp_path: Path) -> None:
    module = tf.Module()
    module.table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(["a", "b"], [1, 2]), -1)

    def answer(words: Any) -> dict[str, Any]:
        return {"number": module.table.lookup(words), "upper": tf.strings.upper(words), "first": words[0]}

    _save(tmp_path, module, answer, tf.TensorSpec([None], tf.string, name="words"))
    engine = _loaded(tmp_path)
    outputs = engine.run("serving_default", {"words": np.array([b"b", b"c"], object)})
    assert "eagerly" not in engine.name
    assert outputs["number"].tolist() == [2, -1]
    assert outputs["upper"].tolist() == [b"B", b"C"]
    assert outputs["first"].shape == ()
    assert outputs["first"].dtype == object


def test_a_variable_that_a_call_changes_keeps_its_value(tmp_path: Path) -> None:
    module = tf.Module()
    module.calls = tf.Variable(0)

    def answer(x: Any) -> dict[str, Any]:
        return {"y": x, "calls": module.calls.assign_add(1)}

    _save(tmp_path, module, answer, tf.TensorSpec([None, 4], tf.float32, name="x"))
    engine = _loaded(tmp_path)
    assert [int(engine.run("serving_default", {"x": X})["calls"]) for _ in range(3)] == [1, 2, 3]


def test_what_a_session_restores_in_part_runs_eagerly(tmp_path: Path) -> None:
    keras = tf.keras
    module = tf.Module()
    module.model = model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])

    def answer(x: Any) -> dict[str, Any]:
        return {"y": model(x)}

    _save(tmp_path, module, answer, tf.TensorSpec([None, 4], tf.float32, name="x"))
    engine = _loaded(tmp_path)
    outputs = engine.run("serving_default", {"x": X})
    assert "eagerly" in engine.name
    np.testing.assert_allclose(outputs["y"], model(X), rtol=1e-5)


def test_one_tensor_of_two_names_is_still_answered(tmp_path: Path) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, [None, 4], name="x")
        y = 2 * x
        names = {"given": x, "twice": y, "too": y}
        tf.compat.v1.saved_model.simple_save(session, str(tmp_path / "model"), {"x": x}, names)
    outputs = _loaded(tmp_path / "model").run("serving_default", {"x": X})
    assert {name: array.tolist() for name, array in outputs.items()} == {
        "given": X.tolist(),
        "twice": (2 * X).tolist(),
        "too": (2 * X).tolist(),
    }


def test_refusals_are_the_callers_fault_in_a_session(tmp_path: Path) -> None:
    def answer(x: Any) -> dict[str, Any]:
        with tf.control_dependencies([tf.debugging.assert_less(x, 100.0, "x is too large")]):
            return {"y": tf.reshape(x, [-1, 2])}

    _save(tmp_path, tf.Module(), answer, tf.TensorSpec([None, 4], tf.float32, name="x"))
    engine = _loaded(tmp_path)
    assert "eagerly" not in engine.name
    with pytest.raises(EngineError, match="x is too large") as caught:
        engine.run("serving_default", {"x": X + 1000})
    assert caught.value.caller_fault
    assert "\n" not in str(caught.value)
    assert engine.run("serving_default", {"x": X})["y"].shape == (4, 2)


def test_what_is_no_model_and_a_signature_that_is_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="TensorFlow can't load it"):
        _loaded(tmp_path)

    def answer(x: Any) -> dict[str, Any]:
        return {"y": x}

    _save(tmp_path / "model", tf.Module(), answer, tf.TensorSpec([None, 4], tf.float32, name="x"))
    with pytest.raises(EngineError, match="no signature 'other'"):
        _loaded(tmp_path / "model", "other")
