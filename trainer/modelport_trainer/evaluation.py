"""Step 4, testing: how good the answers on held-out images are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelport_trainer import _libraries

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Precision, recall and F1, each 0 to 1; 0 where a class was never predicted or never occurs."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScores(Scores):
    """The scores of one class."""

    name: str
    rows: int
    """Test images of this class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """A test image that was given a wrong class."""

    row: int
    """Its index in the test set."""
    label: int
    predicted: int
    probability: float
    """What the model gave the class that it predicted."""
    label_probability: float
    """What it gave the right one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model's answers on a test set are worth."""

    rows: int
    accuracy: float
    loss: float
    """Mean cross-entropy of the labels under the probabilities, in nats."""
    micro: Scores
    macro: Scores
    per_class: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Rows are true classes, columns predicted ones."""
    mistakes: tuple[Mistake, ...]
    """All of them, the most confident first."""

    @property
    def metrics(self) -> dict[str, float]:
        """The figures that are published with a version."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "precision_macro": self.macro.precision,
            "recall_macro": self.macro.recall,
            "f1_macro": self.macro.f1,
            "f1_micro": self.micro.f1,
        }

    def to_json(self) -> dict[str, Any]:
        """Returns the evaluation as plain JSON values."""
        return asdict(self)


def evaluate(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.floating[Any]],
    *,
    predicted: NDArray[np.int64] | None = None,
    class_names: Sequence[str],
) -> Evaluation:
    """Judges answers by scikit-learn.

    Args:
        labels: The right classes, int64 ``[rows]``.
        probabilities: What the model gave each class, ``[rows, classes]``.
        predicted: The classes that the model named, int64 ``[rows]``; the likeliest ones if None.
        class_names: One name per class.
    """
    metrics = _libraries.sklearn().metrics
    named = predicted if predicted is not None else probabilities.argmax(axis=1).astype(np.int64)
    numbers = list(range(len(class_names)))
    each = metrics.precision_recall_fscore_support(labels, named, labels=numbers, zero_division=0)
    return Evaluation(
        rows=len(labels),
        accuracy=float(metrics.accuracy_score(labels, named)),
        loss=_cross_entropy(labels, probabilities, numbers),
        micro=_average(labels, named, numbers, "micro"),
        macro=_average(labels, named, numbers, "macro"),
        per_class=tuple(
            ClassScores(name=name, precision=float(p), recall=float(r), f1=float(f), rows=int(rows))
            for name, p, r, f, rows in zip(class_names, *each, strict=True)
        ),
        confusion=tuple(tuple(row) for row in metrics.confusion_matrix(labels, named, labels=numbers).tolist()),
        mistakes=_mistakes(labels, named, probabilities),
    )


def margins(probabilities: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Returns by how much each row's likeliest class leads the next one; the least are the hardest rows."""
    two = np.sort(probabilities.astype(np.float64), axis=1)[:, -2:]
    return two[:, 1] - two[:, 0]


def _cross_entropy(labels: NDArray[np.int64], probabilities: NDArray[np.floating[Any]], numbers: list[int]) -> float:
    """Normalises in float64 first: float32 rows miss 1 by more than scikit-learn takes without a warning."""
    exact = probabilities.astype(np.float64)
    exact /= exact.sum(axis=1, keepdims=True)
    return float(_libraries.sklearn().metrics.log_loss(labels, exact, labels=numbers))


def _average(labels: NDArray[np.int64], predicted: NDArray[np.int64], numbers: list[int], average: str) -> Scores:
    precision, recall, f1, _ = _libraries.sklearn().metrics.precision_recall_fscore_support(
        labels, predicted, labels=numbers, average=average, zero_division=0
    )
    return Scores(precision=float(precision), recall=float(recall), f1=float(f1))


def _mistakes(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], probabilities: NDArray[np.floating[Any]]
) -> tuple[Mistake, ...]:
    wrong = np.flatnonzero(labels != predicted)
    given = probabilities[wrong, predicted[wrong]]
    return tuple(
        Mistake(
            row=int(row),
            label=int(labels[row]),
            predicted=int(predicted[row]),
            probability=float(probabilities[row, predicted[row]]),
            label_probability=float(probabilities[row, labels[row]]),
        )
        for row in wrong[np.argsort(-given, kind="stable")]
    )
