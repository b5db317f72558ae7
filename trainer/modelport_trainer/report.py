"""The report on a test: one HTML file with all pictures in it, and the same as PNG and JSON files."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelport_trainer import _plots
from modelport_trainer.data import DataReport, Dataset
from modelport_trainer.errors import TrainerError
from modelport_trainer.evaluation import Evaluation
from modelport_trainer.model import Layer
from modelport_trainer.training import TrainingResult

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #e5e7eb; padding-bottom: .2rem }
.sub { color: #6b7280; margin-top: .2rem } img { max-width: 100%; height: auto }
table { border-collapse: collapse; margin: .6rem 0 } th { text-align: left; font-weight: 600 }
th, td { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #f3f4f6; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0 }
.card { border: 1px solid #e5e7eb; border-radius: .5rem; padding: .6rem 1.1rem; min-width: 7rem }
.card b { display: block; font-size: 1.5rem } .card span { color: #6b7280 }
code { word-break: break-all }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportContent:
    """What a report tells; the parts about training are None when a stored version is tested."""

    title: str
    dataset: Dataset
    data: DataReport
    evaluation: Evaluation
    probabilities: NDArray[np.floating[Any]]
    """What the model said to the test images, ``[rows, classes]``."""
    layers: Sequence[Layer] | None = None
    training: TrainingResult | None = None
    parameters: Mapping[str, Any] | None = None
    """The options that the model was made with, by section."""


def write_report(folder: Path, content: ReportContent) -> Path:
    """Writes ``index.html`` with the PNG and JSON files that it was made from.

    Args:
        folder: Where to write; made if need be, files of the same names are replaced.
        content: What to tell.

    Returns:
        The path of ``index.html``.

    Raises:
        TrainerError: If the folder cannot be written.
    """
    pictures = _pictures(content)
    files = {f"{name}.png": picture for name, picture in pictures.items()}
    for name, values in _tables(content).items():
        files[f"{name}.json"] = json.dumps(values, indent=2).encode() + b"\n"
    files["index.html"] = _page(content, pictures).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise TrainerError(f"{folder}: the report cannot be written ({error.strerror})") from None
    return folder / "index.html"


def _pictures(content: ReportContent) -> dict[str, bytes]:
    names = content.dataset.class_names
    test = content.dataset.test
    pictures = {"samples": _plots.samples(test, names)}
    if content.training is not None:
        pictures["curves"] = _plots.curves(content.training)
    pictures["confusion"] = _plots.confusion(content.evaluation, names)
    if content.evaluation.mistakes:
        pictures["mistakes"] = _plots.mistakes(test, content.evaluation.mistakes, content.probabilities, names)
    return pictures


def _tables(content: ReportContent) -> dict[str, Any]:
    tables: dict[str, Any] = {"data": content.data.to_json(), "evaluation": content.evaluation.to_json()}
    if content.training is not None:
        tables["training"] = {
            "parameters": content.parameters,
            "layers": [asdict(layer) for layer in content.layers or ()],
            **content.training.to_json(),
        }
    return tables


def _page(content: ReportContent, pictures: Mapping[str, bytes]) -> str:
    evaluation = content.evaluation
    parts = [
        f"<h1>{html.escape(content.title)}</h1>",
        f'<p class="sub">{evaluation.rows:,} test images of {html.escape(content.data.source)}, '
        f"{content.dataset.classes} classes</p>",
        _cards(evaluation),
        "<h2>Classes</h2>",
        _class_table(evaluation),
        "<h2>Confusion matrix</h2>",
        _image(pictures, "confusion", "Confusion matrix"),
        "<h2>Worst mistakes</h2>",
        _mistakes_part(evaluation, pictures),
        *_training_part(content, pictures),
        "<h2>Data</h2>",
        _data_table(content.data),
        _image(pictures, "samples", "Test images of each class"),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(content.title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
        "</body></html>\n"
    )


def _cards(evaluation: Evaluation) -> str:
    figures = {
        "accuracy": f"{evaluation.accuracy:.4f}",
        "loss": f"{evaluation.loss:.4f}",
        "precision, macro": f"{evaluation.macro.precision:.4f}",
        "recall, macro": f"{evaluation.macro.recall:.4f}",
        "F1, macro": f"{evaluation.macro.f1:.4f}",
        "mistakes": f"{len(evaluation.mistakes):,}",
    }
    cards = (f'<div class="card"><b>{value}</b><span>{name}</span></div>' for name, value in figures.items())
    return f'<div class="cards">{"".join(cards)}</div>'


def _class_table(evaluation: Evaluation) -> str:
    scored = [(scores.name, scores, f"{scores.rows:,}") for scores in evaluation.per_class]
    averages = [
        ("micro average", evaluation.micro, f"{evaluation.rows:,}"),
        ("macro average", evaluation.macro, ""),
    ]
    rows = [
        (name, f"{scores.precision:.4f}", f"{scores.recall:.4f}", f"{scores.f1:.4f}", count)
        for name, scores, count in [*scored, *averages]
    ]
    return _table(("class", "precision", "recall", "F1", "images"), rows)


def _mistakes_part(evaluation: Evaluation, pictures: Mapping[str, bytes]) -> str:
    if not evaluation.mistakes:
        return "<p>None: every test image was named right.</p>"
    caption = (
        "<p>The wrong answers that the model was surest of. Bars are the probabilities it gave: "
        "red for what it said, green for what is right.</p>"
    )
    return caption + _image(pictures, "mistakes", "Wrong answers with their probabilities")


def _training_part(content: ReportContent, pictures: Mapping[str, bytes]) -> list[str]:
    training = content.training
    if training is None:
        return []
    parameters = content.parameters or {}
    flat = [
        (f"{section}: {name.replace('_', ' ')}", str(value))
        for section, values in parameters.items()
        for name, value in values.items()
    ]
    layers = [
        (layer.name, layer.kind, _shape(layer.output_shape), f"{layer.parameters:,}") for layer in content.layers or ()
    ]
    ending = "stopped early" if training.stopped_early else "ran to its end"
    return [
        "<h2>Training</h2>",
        f"<p>{len(training.history)} epochs, {ending}; epoch {training.best_epoch} had the lowest "
        "validation loss, its weights are the ones that were kept.</p>",
        _image(pictures, "curves", "Loss and accuracy by epoch"),
        "<h2>Model</h2>",
        _table(("layer", "kind", "output", "parameters"), layers),
        _table(("option", "value"), flat, numbers_from=2),
    ]


def _data_table(data: DataReport) -> str:
    rows = [
        ("rows as read", f"{data.train.rows:,}", f"{data.test.rows:,}"),
        ("rows after cleaning", f"{data.train_rows:,}", f"{data.test_rows:,}"),
        ("image size", _shape(data.train.image_shape), _shape(data.test.image_shape)),
        ("pixel values", _range(data.train.lowest, data.train.highest), _range(data.test.lowest, data.test.highest)),
        ("constant images", f"{data.train.constant:,}", f"{data.test.constant:,}"),
        ("repeated images", f"{data.train.duplicates:,}", f"{data.test.duplicates:,}"),
        ("unlabelled", f"{data.train.unlabelled:,}", f"{data.test.unlabelled:,}"),
    ]
    told = [
        f"{data.duplicates_across:,} training images are also in test.",
        *(f"Removed from {r.split}: {r.rows:,}, {r.reason}." for r in data.removed),
        *(f"Noticed: {note}." for note in data.notes),
    ]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in told)
    digest = f"<p>SHA-256 of the data: <code>{data.sha256}</code></p>"
    return _table(("", "train", "test"), rows) + f"<ul>{items}</ul>" + digest


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int = 1) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ("" if place < numbers_from else ' class="n"' for place in range(len(cells)))
        written = (f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(written)}</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _image(pictures: Mapping[str, bytes], name: str, description: str) -> str:
    data = base64.b64encode(pictures[name]).decode()
    return f'<p><img alt="{html.escape(description)}" src="data:image/png;base64,{data}"></p>'


def _shape(shape: Sequence[int | None]) -> str:
    return " x ".join("any" if size is None else str(size) for size in shape)


def _range(lowest: int, highest: int) -> str:
    return f"{lowest} to {highest}"
