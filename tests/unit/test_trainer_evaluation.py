"""Figures of a test by hand, the choice of golden examples, and what the report's pictures take."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modelport_trainer import _plots
from modelport_trainer.data import Split
from modelport_trainer.deployment import choose_golden
from modelport_trainer.evaluation import evaluate, margins

NAMES = ("cat", "dog", "owl")
LABELS = np.array([0, 0, 0, 1, 1, 2])
PROBABILITIES = np.array(
    [
        [0.7, 0.2, 0.1],
        [0.4, 0.5, 0.1],
        [0.1, 0.1, 0.8],
        [0.1, 0.8, 0.1],
        [0.3, 0.6, 0.1],
        [0.0, 0.95, 0.05],
    ],
    dtype=np.float32,
)


def test_figures_are_those_of_a_hand_calculation() -> None:
    found = evaluate(LABELS, PROBABILITIES, class_names=NAMES)
    assert found.rows == 6
    assert found.accuracy == pytest.approx(3 / 6)
    assert found.confusion == ((1, 1, 1), (0, 2, 0), (0, 1, 0))
    cat, dog, owl = found.per_class
    assert (cat.name, cat.rows) == ("cat", 3)
    assert [cat.precision, cat.recall] == pytest.approx([1.0, 1 / 3])
    assert [dog.precision, dog.recall, dog.f1] == pytest.approx([0.5, 1.0, 2 / 3])
    assert (owl.precision, owl.recall, owl.f1) == (0.0, 0.0, 0.0)
    assert found.macro.precision == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert found.macro.recall == pytest.approx((1 / 3 + 1.0 + 0.0) / 3)
    assert found.micro.precision == found.micro.recall == pytest.approx(0.5)
    assert found.loss == pytest.approx(-sum(map(math.log, (0.7, 0.4, 0.1, 0.8, 0.6, 0.05))) / 6, rel=1e-5)
    assert found.metrics["accuracy"] == 0.5


def test_mistakes_come_with_the_most_confident_first() -> None:
    found = evaluate(LABELS, PROBABILITIES, class_names=NAMES)
    assert [(m.row, m.label, m.predicted) for m in found.mistakes] == [(5, 2, 1), (2, 0, 2), (1, 0, 1)]
    assert found.mistakes[0].probability == pytest.approx(0.95)
    assert found.mistakes[0].label_probability == pytest.approx(0.05)


def test_the_classes_that_the_model_named_are_what_is_judged() -> None:
    assert evaluate(LABELS, PROBABILITIES, predicted=LABELS, class_names=NAMES).accuracy == 1.0


def test_a_class_that_never_occurs_is_no_division_by_zero() -> None:
    found = evaluate(LABELS[:5], PROBABILITIES[:5], class_names=NAMES)
    assert found.per_class[2].rows == 0
    assert found.per_class[2].recall == 0.0


def test_margins() -> None:
    np.testing.assert_allclose(margins(PROBABILITIES[:2]), [0.5, 0.1], atol=1e-6)


def some_probabilities(rows: int, classes: int, seed: int, sharpness: float) -> NDArray[np.float32]:
    scores = np.random.default_rng(seed).normal(0, sharpness, (rows, classes))
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    normalised: NDArray[np.float32] = (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
    return normalised


@given(rows=st.integers(1, 400), classes=st.integers(2, 12), seed=st.integers(0, 99), sharpness=st.floats(0, 20))
def test_golden_rows_are_distinct_and_enough(rows: int, classes: int, seed: int, sharpness: float) -> None:
    probabilities = some_probabilities(rows, classes, seed, sharpness)
    chosen = choose_golden(probabilities, np.arange(rows) % classes)
    assert len(set(chosen.tolist())) == len(chosen)
    assert min(rows, 32) <= len(chosen) <= 64


def test_golden_rows_are_the_hardest_that_are_no_tie_and_some_of_each_class() -> None:
    probabilities = some_probabilities(1000, 10, 3, 5.0)
    probabilities[17] = 0.1  # a tie says nothing about an engine
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    chosen = set(choose_golden(probabilities, labels).tolist())
    hardest = [row for row in np.argsort(margins(probabilities)).tolist() if margins(probabilities)[row] >= 1e-3]
    assert 17 not in chosen
    assert set(hardest[:32]) <= chosen
    assert set(labels[sorted(chosen - set(hardest[:32]))].tolist()) == set(range(10))


@pytest.mark.parametrize("classes", [2, 3, 40])
def test_pictures_take_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    from PIL import Image

    rows = classes * 3
    images = np.random.default_rng(1).integers(0, 256, (rows, 9, 5)).astype(np.uint8)
    labels = np.arange(rows) % classes
    names = [f"a rather long name {number}" for number in range(classes)]
    probabilities = some_probabilities(rows, classes, 1, 2.0)
    found = evaluate(labels, probabilities, class_names=names)
    split = Split(images, labels)
    pictures = {
        "samples": _plots.samples(split, names),
        "confusion": _plots.confusion(found, names),
        "mistakes": _plots.mistakes(split, found.mistakes, probabilities, names),
        "one": _plots.mistakes(split, found.mistakes[:1], probabilities, names),
    }
    for name, data in pictures.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(data)
        with Image.open(path) as image:
            assert min(image.size) > 100
            assert image.convert("L").getextrema() != (255, 255)
