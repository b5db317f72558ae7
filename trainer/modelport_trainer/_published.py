"""Testing a published version: its stored model in this process, or the model as it is served."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import modelport
from modelport_registry import Registry
from modelport_trainer import data
from modelport_trainer.data import BUILT_IN, DataReport, Dataset, DataSource
from modelport_trainer.errors import DataError, ExportError, OptionError
from modelport_trainer.evaluation import Evaluation, evaluate
from modelport_trainer.prediction import SavedModelPredictor
from modelport_trainer.report import ReportContent, write_report

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STREAM_ROWS = 128
_STREAM_WINDOW = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a model said to the test images of a data set."""

    model: str
    versions: tuple[int, ...]
    """The versions that answered, ascending."""
    asked: str
    """Who was asked, in words."""
    dataset: Dataset
    found: DataReport
    probabilities: NDArray[np.float32]
    """float32 ``[rows, classes]``"""
    classes: NDArray[np.int64]
    """int64 ``[rows]``"""
    duration_s: float
    trained_on_this: bool | None
    """Whether the version was trained on this very data; None if that is not known."""

    def to_json(self) -> dict[str, Any]:
        """Returns what there is to say beside the evaluation, as plain JSON values."""
        return {
            "model": self.model,
            "versions": list(self.versions),
            "asked": self.asked,
            "source": str(self.dataset.source),
            "data_sha256": self.dataset.sha256,
            "trained_on_this": self.trained_on_this,
            "duration_s": round(self.duration_s, 3),
        }


def source_for(
    registry: Path, model: str, version: int | None, name: str | None, data_dir: Path | None, *, served: bool
) -> DataSource:
    """Returns the data that is asked for, or else what the version says that it was trained on.

    Raises:
        OptionError: If neither says anything that can be used.
        RegistryError: If there is no such version.
    """
    if name is not None or data_dir is not None:
        return DataSource.parse(name, data_dir)
    if served:
        raise OptionError("say which images to send: --data NAME or --data-dir FOLDER")
    store = Registry(registry)
    number = store.resolve(model, version=version)
    kind, _, path = (store.manifest(model, number).lineage.source or "").partition(":")
    if kind in BUILT_IN and not path:
        return DataSource(kind)
    if kind in {"idx", "npz"} and Path(path).exists():
        return DataSource(kind, Path(path))
    raise OptionError(f"{model}/{number} does not say where its data is: give --data or --data-dir")


def ask_stored(registry: Path, model: str, version: int | None, source: DataSource) -> Answers:
    """Asks a registry's version by TensorFlow in this process.

    Raises:
        RegistryError: If there is no such version.
        ExportError: If it is no classifier of such images.
    """
    store = Registry(registry)
    number = store.resolve(model, version=version)
    dataset, found = data.load(source)
    with store.lease(model, number):
        predictor = SavedModelPredictor(store.path(model, number))
        began = time.monotonic()
        outputs = predictor.predict({"images": dataset.test.images})
        duration_s = time.monotonic() - began
    trained_on = store.manifest(model, number).lineage.data_sha256
    probabilities, classes = _classifier_outputs(f"{model}/{number}", outputs, dataset)
    return Answers(
        model=model,
        versions=(number,),
        asked="by TensorFlow in this process",
        dataset=dataset,
        found=found,
        probabilities=probabilities,
        classes=classes,
        duration_s=duration_s,
        trained_on_this=None if trained_on is None else trained_on == dataset.sha256,
    )


def ask_server(address: str, model: str, version: int | None, source: DataSource) -> Answers:
    """Streams all test images to a server.

    Raises:
        ModelportError: If the server cannot be asked, or does not answer every image.
        ExportError: If the model is no classifier of such images.
    """
    dataset, found = data.load(source)
    parts: dict[str, list[NDArray[Any]]] = {"probabilities": [], "classes": []}
    versions: set[int] = set()
    began = time.monotonic()
    with modelport.Client(address) as client:
        stream = client.predict_stream(model, _batches(dataset.test.images), version=version, window=_STREAM_WINDOW)
        for result in stream:
            prediction = result.prediction
            versions.add(prediction.version)
            for name, part in parts.items():
                if name not in prediction:
                    raise ExportError(f"{model}: no output {name!r}; evaluate needs probabilities and classes")
                part.append(prediction[name])
    duration_s = time.monotonic() - began
    outputs = {name: np.concatenate(part) for name, part in parts.items()}
    probabilities, classes = _classifier_outputs(model, outputs, dataset)
    return Answers(
        model=model,
        versions=tuple(sorted(versions)),
        asked=f"as served at {address}",
        dataset=dataset,
        found=found,
        probabilities=probabilities,
        classes=classes,
        duration_s=duration_s,
        trained_on_this=None,
    )


def judge(answers: Answers) -> Evaluation:
    """Returns what the answers are worth."""
    return evaluate(
        answers.dataset.test.labels,
        answers.probabilities,
        predicted=answers.classes,
        class_names=answers.dataset.class_names,
    )


def report_on(answers: Answers, evaluation: Evaluation, folder: Path) -> Path:
    """Writes a report and returns the path of its HTML file."""
    versions = ", ".join(str(version) for version in answers.versions)
    content = ReportContent(
        title=f"{answers.model}/{versions}, {answers.asked}",
        dataset=answers.dataset,
        data=answers.found,
        evaluation=evaluation,
        probabilities=answers.probabilities,
    )
    return write_report(folder, content)


def _batches(images: NDArray[np.uint8]) -> Iterator[Mapping[str, NDArray[np.uint8]]]:
    for start in range(0, len(images), _STREAM_ROWS):
        yield {"images": images[start : start + _STREAM_ROWS]}


def _classifier_outputs(
    what: str, outputs: Mapping[str, NDArray[Any]], dataset: Dataset
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    missing = {"probabilities", "classes"} - outputs.keys()
    if missing:
        raise ExportError(f"{what}: no output {min(missing)!r}; evaluate needs probabilities and classes")
    probabilities, classes = outputs["probabilities"], outputs["classes"]
    rows = len(dataset.test)
    if len(probabilities) != rows or len(classes) != rows:
        raise ExportError(f"{what}: {len(classes):,} answers to {rows:,} images")
    if probabilities.shape != (rows, dataset.classes):
        raise DataError(f"{what}: knows {probabilities.shape[-1]} classes, {dataset.source} has {dataset.classes}")
    return probabilities.astype(np.float32), classes.astype(np.int64)
