"""Exported models answer what Keras answers in process; any Keras model can be published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelport_registry import Lineage, Registry
from modelport_trainer import _libraries, presets
from modelport_trainer.augmentation import Augmentation, augment
from modelport_trainer.data import Dataset, DataSource, Split
from modelport_trainer.deployment import (
    classifier_golden,
    export_classifier,
    export_keras,
    lineage_of,
    publish_keras,
)
from modelport_trainer.errors import ExportError, RunError, TrainingError
from modelport_trainer.model import AccurateNetwork, HyperParameters, build, summarize
from modelport_trainer.prediction import SavedModelPredictor
from modelport_trainer.run import RunFolder
from modelport_trainer.training import EpochResult, TrainingOptions, make_repeatable, train


class Quiet:
    """A listener that only counts."""

    def __init__(self) -> None:
        self.steps = 0
        self.epochs: list[EpochResult] = []

    def epoch_started(self, epoch: int, epochs: int, steps: int) -> None:
        self.expected = steps

    def step_done(self, step: int) -> None:
        self.steps += 1

    def epoch_done(self, result: EpochResult, *, best: bool) -> None:
        self.epochs.append(result)


def some_images(rows: int = 60) -> Split:
    """Two classes that differ in brightness."""
    random = np.random.default_rng(2)
    labels = np.arange(rows) % 2
    images = (random.integers(0, 80, (rows, 10, 12)) + labels[:, None, None] * 150).astype(np.uint8)
    return Split(images, labels.astype(np.int64))


@pytest.fixture(scope="module")
def classifier() -> Any:
    return build(HyperParameters(filters=(4,), dense_units=8), image_shape=(10, 12), classes=2)


def test_the_default_network_is_the_classic_one() -> None:
    layers = summarize(build(HyperParameters(), image_shape=(28, 28), classes=10))
    kinds = [layer.kind for layer in layers]
    assert kinds == [
        *("InputLayer", "Rescaling", "Reshape", "Conv2D", "Conv2D", "MaxPooling2D"),
        *("Dropout", "Flatten", "Dense", "Dropout", "Dense"),
    ]
    assert sum(layer.parameters for layer in layers) == 1_199_882
    assert layers[-1].output_shape == (None, 10)


def test_the_exported_classifier_equals_keras(classifier: Any, tmp_path: Path) -> None:
    images = some_images().images
    export_classifier(classifier, tmp_path / "model")
    answers = SavedModelPredictor(tmp_path / "model").predict({"images": images})
    expected = np.asarray(classifier.predict(images, verbose=0))
    np.testing.assert_allclose(answers["probabilities"], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(answers["classes"], expected.argmax(axis=1))
    assert answers["probabilities"].dtype == np.float32
    assert answers["classes"].dtype == np.int64


def test_few_test_images_are_filled_up_with_training_images(classifier: Any, tmp_path: Path) -> None:
    export_classifier(classifier, tmp_path / "model")
    predictor = SavedModelPredictor(tmp_path / "model")
    split = some_images()
    test = split.take(np.arange(5))
    data = Dataset(source=DataSource("npz"), train=split, test=test, class_names=("a", "b"), sha256="")
    probabilities = predictor.predict({"images": test.images})["probabilities"]
    assert len(classifier_golden(predictor, data, probabilities).inputs["images"]) >= 32


@pytest.mark.parametrize("loss", ["crossentropy", "focal", "mse"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam", "sgd"])
def test_every_loss_and_optimiser_trains(loss: Any, optimizer: Any, tmp_path: Path) -> None:
    model = build(HyperParameters(filters=(2,), dense_units=4), image_shape=(10, 12), classes=2)
    listener = Quiet()
    options = TrainingOptions(loss=loss, optimizer=optimizer, epochs=1, batch_size=16)
    result = train(model, some_images(), options, RunFolder(tmp_path), listener)
    assert listener.steps == listener.expected == 3
    assert listener.epochs == list(result.history)
    assert result.best_epoch == 1


def test_training_stops_early_with_the_best_weights(tmp_path: Path) -> None:
    split = some_images()
    # Labels that are noise: the validation loss cannot go on getting better.
    noise = Split(split.images, np.random.default_rng(0).integers(0, 2, 60))
    model = build(HyperParameters(filters=(4,), dense_units=8), image_shape=(10, 12), classes=2)
    options = TrainingOptions(epochs=60, patience=1, batch_size=8, learning_rate=0.02)
    run = RunFolder(tmp_path)
    result = train(model, noise, options, run, Quiet())
    assert result.stopped_early
    assert len(result.history) == result.best_epoch + 1 < 60
    for variable, stored in zip(model.variables, run.read_best(), strict=True):
        np.testing.assert_array_equal(variable.numpy(), stored)


def test_a_loss_that_is_no_number_ends_training(tmp_path: Path) -> None:
    model = build(HyperParameters(filters=(4,), dense_units=8), image_shape=(10, 12), classes=2)
    options = TrainingOptions(optimizer="sgd", learning_rate=1e30, epochs=5)
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train(model, some_images(), options, RunFolder(tmp_path), Quiet())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    small, large = (
        build(HyperParameters(filters=(size,), dense_units=4), image_shape=(10, 12), classes=2) for size in (2, 3)
    )
    train(small, some_images(), TrainingOptions(epochs=1), run, Quiet())
    with pytest.raises(RunError, match="of another model"):
        train(large, some_images(), TrainingOptions(epochs=2), run, Quiet())


SMALL = AccurateNetwork(stages=((8,), (8,)))


def accurate(seed: int, run: Path, listener: Quiet) -> tuple[Any, list[EpochResult]]:
    """Trains a small accurate network for four epochs."""
    _, options = presets.choose("accurate", training={"epochs": 4, "batch_size": 8, "seed": seed})
    make_repeatable(seed)
    model = build(SMALL, image_shape=(10, 12), classes=2)
    run.mkdir(exist_ok=True)
    result = train(model, some_images(), options, RunFolder(run), listener)
    return model, list(result.history)


def bits(model: Any) -> list[bytes]:
    return [variable.numpy().tobytes() for variable in model.variables]


def test_the_accurate_network() -> None:
    layers = summarize(build(AccurateNetwork(), image_shape=(28, 28), classes=10))
    stage = ["Conv2D", "MaxPooling2D", "BatchNormalization", "ReLU"]
    assert [layer.kind for layer in layers] == [
        *("InputLayer", "Rescaling", "Reshape"),
        *(*stage, *stage, "Conv2D", "BatchNormalization", "ReLU", *stage),
        *("Flatten", "Dropout", "Dense"),
    ]
    assert layers[-1].output_shape == (None, 10)
    assert build(AccurateNetwork(), image_shape=(8, 8), classes=3).output.shape == (None, 3)


def test_the_accurate_preset_learns_and_keeps_the_contract(tmp_path: Path) -> None:
    model, history = accurate(1, tmp_path / "run", Quiet())
    assert history[-1].loss < history[0].loss
    assert history[-1].learning_rate < history[0].learning_rate <= 0.1
    images, labels = some_images().images, some_images().labels
    export_classifier(model, tmp_path / "model")
    predictor = SavedModelPredictor(tmp_path / "model")
    assert predictor.input_names == ("images",)
    answers = predictor.predict({"images": images})
    assert {name: value.dtype.name for name, value in answers.items()} == {
        "probabilities": "float32",
        "classes": "int64",
    }
    assert np.mean(answers["classes"] == labels) > 0.9
    np.testing.assert_allclose(answers["probabilities"], model.predict(images, verbose=0), rtol=0, atol=1e-6)
    alone = np.concatenate([predictor.predict({"images": image[None]})["probabilities"] for image in images])
    np.testing.assert_allclose(answers["probabilities"], alone, rtol=0, atol=1e-6)


class Interrupted(Quiet):
    """A listener that ends training after two epochs."""

    def epoch_done(self, result: EpochResult, *, best: bool) -> None:
        super().epoch_done(result, best=best)
        if result.epoch == 2:
            raise KeyboardInterrupt


def test_the_accurate_preset_is_repeatable_also_when_interrupted(tmp_path: Path) -> None:
    model, history = accurate(5, tmp_path / "one", Quiet())
    with pytest.raises(KeyboardInterrupt):
        accurate(5, tmp_path / "two", Interrupted())
    resumed, same = accurate(5, tmp_path / "two", Quiet())
    assert bits(resumed) == bits(model)
    assert [(epoch.loss, epoch.learning_rate) for epoch in same] == [(e.loss, e.learning_rate) for e in history]
    other, _ = accurate(6, tmp_path / "three", Quiet())
    assert bits(other) != bits(model)


def test_normalisation_is_that_of_keras() -> None:
    ours = build(AccurateNetwork(stages=((4,),)), image_shape=(6, 6), classes=2).get_layer("norm_1_1")
    theirs = _libraries.keras().layers.BatchNormalization(momentum=0.95, epsilon=1e-3)
    batches = np.random.default_rng(3).normal(2, 3, (3, 64, 3, 3, 4)).astype(np.float32)
    for batch in batches:
        np.testing.assert_allclose(ours(batch, training=True), theirs(batch, training=True), rtol=0, atol=1e-4)
    # TensorFlow's operation has the sample's variance, Keras that of the batch: 1 in 576 more here.
    for batch in batches:
        np.testing.assert_allclose(ours(batch, training=False), theirs(batch, training=False), rtol=0, atol=5e-3)


def test_augmentation_follows_from_its_generator() -> None:
    images = some_images().images
    first, again, other = (augment(images, Augmentation(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.dtype == np.uint8
    assert first.shape == images.shape
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    nothing = Augmentation(rotation_degrees=0, scaling=0, slant=0, shift=0)
    np.testing.assert_array_equal(augment(images, nothing, np.random.default_rng(1)), images)


def test_augmentation_changes_images_no_more_than_it_says() -> None:
    spot = np.zeros((500, 29, 29), np.uint8)
    spot[:, 14, 14] = 255  # in the middle, so that only a shift moves it
    moved = augment(spot, Augmentation(shift=0.1), np.random.default_rng(1))
    rows, _, _ = np.nonzero(moved)
    assert len(set(rows.tolist())) == 500
    inside = moved[:, 10:19, 10:19]
    assert np.count_nonzero(inside) == np.count_nonzero(moved)
    assert np.count_nonzero(moved[:, 12:17, 12:17]) < np.count_nonzero(moved)


def two_by_two(*, named: bool) -> Any:
    """A Keras model of two inputs of different types and two outputs."""
    keras = _libraries.keras()
    zeta = keras.Input((3,), name="zeta")
    alpha = keras.Input((2,), dtype="int32", name="alpha")
    joined = keras.layers.Concatenate()([zeta, keras.layers.Embedding(9, 4)(alpha)[:, 0, :]])
    left, right = keras.layers.Dense(2, name="left")(joined), keras.layers.Dense(1, name="right")(joined)
    if named:
        return keras.Model({"zeta": zeta, "alpha": alpha}, {"second": left, "first": right})
    return keras.Model([zeta, alpha], [left, right])


@pytest.mark.parametrize("named", [False, True])
def test_any_keras_model_is_published(tmp_path: Path, named: bool) -> None:
    model = two_by_two(named=named)
    inputs = {
        "zeta": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32),
        "alpha": np.arange(10, dtype=np.int32).reshape(5, 2) % 9,
    }
    registry = Registry(tmp_path)
    published = publish_keras(
        registry, "two", model, inputs, metrics={"mae": 0.5}, lineage=Lineage(source="a test"), aliases=["stable"]
    )
    manifest = registry.verify("two", published.version)
    assert manifest.golden == 5
    (golden,) = registry.golden("two", 1)
    expected = model(inputs if named else [inputs["zeta"], inputs["alpha"]])
    expected = expected if named else dict(zip(("left", "right"), expected, strict=True))
    assert golden.outputs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(golden.outputs[name], value.numpy(), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_exported_or_run_is_one_clear_line(tmp_path: Path) -> None:
    keras = _libraries.keras()
    with pytest.raises(ExportError, match="only functional Keras models"):
        export_keras(keras.Sequential([keras.layers.Dense(2)]), tmp_path / "no")
    export_keras(keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(2, name="y")]), tmp_path / "yes")
    predictor = SavedModelPredictor(tmp_path / "yes")
    assert predictor.input_names == ("x",)
    assert predictor.predict({"x": np.zeros((0, 3), np.float32)})["y"].shape == (0, 2)
    for inputs in ({"z": np.zeros((1, 3))}, {"x": np.zeros((1, 4))}, {"x": np.array(["a"])}):
        with pytest.raises(ExportError) as error:
            predictor.run(inputs)
        assert "\n" not in str(error.value)
    with pytest.raises(ExportError, match="no signature 'other'; it has serving_default"):
        SavedModelPredictor(tmp_path / "yes", "other")
    with pytest.raises(ExportError, match="no saved_model"):
        SavedModelPredictor(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="TensorFlow cannot load it"):
        SavedModelPredictor(tmp_path)


def test_lineage_names_the_code() -> None:
    lineage = lineage_of("digits", "ab" * 32, {"epochs": 3})
    revision = (lineage.code_revision or "").removesuffix("-dirty")
    assert revision.startswith("modelport ") or (len(revision) == 40 and int(revision, 16))
