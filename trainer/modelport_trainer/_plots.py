"""The report's pictures, each returned as the bytes of a PNG file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modelport_trainer import _libraries

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelport_trainer.data import Split
    from modelport_trainer.evaluation import Evaluation, Mistake
    from modelport_trainer.training import TrainingResult

_DPI = 110
_INK = "#1f2937"
_FAINT = "#9ca3af"
_BLUE = "#2563eb"
_ORANGE = "#ea580c"
_GREEN = "#15803d"
_RED = "#b91c1c"
_SAMPLES_PER_CLASS = 10
_MOST_CLASSES_SHOWN = 20
_MOST_CLASSES_NUMBERED = 30
_MISTAKES_PER_ROW = 4
_MISTAKE_ROWS = 5
_BARS = 3
_LONGEST_NAME = 12


def samples(split: Split, class_names: Sequence[str]) -> bytes:
    """Draws some images of each class, a class per row."""
    numbers = [number for number in range(len(class_names)) if (split.labels == number).any()]
    shown = numbers[:_MOST_CLASSES_SHOWN]
    figure = _figure(0.62 * _SAMPLES_PER_CLASS + 1.3, 0.62 * len(shown) + 0.1)
    grid = figure.subplots(
        len(shown),
        _SAMPLES_PER_CLASS,
        squeeze=False,
        gridspec_kw={"wspace": 0.18, "hspace": 0.18, "left": 0.17, "right": 0.99, "top": 0.99, "bottom": 0.01},
    )
    for number, row in zip(shown, grid, strict=True):
        found = np.flatnonzero(split.labels == number)[:_SAMPLES_PER_CLASS]
        for axes in row:
            axes.axis("off")
        for axes, index in zip(row, found, strict=False):
            _draw_image(axes, split.images[index])
        row[0].text(
            -0.15,
            0.5,
            _short(class_names[number]),
            transform=row[0].transAxes,
            ha="right",
            va="center",
            fontsize=10,
            color=_INK,
        )
    return _png(figure, tight=True)


def curves(result: TrainingResult) -> bytes:
    """Draws loss and accuracy of every epoch, on training and on validation images."""
    figure = _figure(9.2, 3.5)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.22})
    history = result.history
    epochs = [entry.epoch for entry in history]
    _draw_curve(left, "Loss", epochs, [e.loss for e in history], [e.val_loss for e in history])
    _draw_curve(right, "Accuracy", epochs, [e.accuracy for e in history], [e.val_accuracy for e in history])
    for axes in (left, right):
        axes.axvline(result.best_epoch, color=_GREEN, linewidth=1, linestyle=":")
    best = history[result.best_epoch - 1]
    left.plot(best.epoch, best.val_loss, "o", color=_GREEN, label=f"kept: epoch {best.epoch}", zorder=5)
    right.plot(best.epoch, best.val_accuracy, "o", color=_GREEN, zorder=5)
    left.legend(
        *left.get_legend_handles_labels(),
        loc="lower left",
        bbox_to_anchor=(0, 1.1),
        borderaxespad=0,
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
    )
    return _png(figure, tight=True)


def confusion(evaluation: Evaluation, class_names: Sequence[str]) -> bytes:
    """Draws the confusion matrix: right answers in green, each cell of wrong ones the redder, the more."""
    counts = np.array(evaluation.confusion, dtype=np.int64)
    classes = len(counts)
    side = min(max(0.55 * classes + 1.6, 3.6), 12.0)
    figure = _figure(side, side)
    axes = figure.subplots()
    axes.imshow(_confusion_colours(counts), interpolation="nearest")
    if classes <= _MOST_CLASSES_NUMBERED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=9, color=_INK)
        names = [_short(name) for name in class_names]
        slanted = max(len(name) for name in names) > 3
        axes.set_xticks(range(classes), names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
        axes.set_yticks(range(classes), names)
        axes.set_xticks(np.arange(classes - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(classes - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="#e5e7eb", linewidth=0.6)
    axes.tick_params(which="both", length=0, colors=_INK)
    axes.set_xlabel("the model said", color=_INK)
    axes.set_ylabel("the image is", color=_INK)
    for spine in axes.spines.values():
        spine.set_color("#e5e7eb")
    return _png(figure, tight=True)


def mistakes(
    split: Split,
    found: Sequence[Mistake],
    probabilities: NDArray[np.floating[Any]],
    class_names: Sequence[str],
) -> bytes:
    """Draws the most confident wrong answers: each image beside what the model gave its likeliest classes."""
    shown = found[: _MISTAKES_PER_ROW * _MISTAKE_ROWS]
    columns = min(_MISTAKES_PER_ROW, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(2.6 * columns, 1.55 * rows)
    grid = figure.add_gridspec(
        rows,
        columns * 2,
        width_ratios=[1.0, 0.95] * columns,
        wspace=0.12,
        hspace=0.42,
        left=0.01,
        right=0.985,
        top=1 - 0.3 / (1.55 * rows),
        bottom=0.02,
    )
    for place, mistake in enumerate(shown):
        row, column = divmod(place, columns)
        picture = figure.add_subplot(grid[row, 2 * column])
        picture.axis("off")
        _draw_image(picture, split.images[mistake.row])
        picture.set_title(
            f"is {_short(class_names[mistake.label])}, said {_short(class_names[mistake.predicted])}",
            fontsize=9,
            color=_INK,
            loc="left",
            pad=4,
        )
        _draw_bars(figure.add_subplot(grid[row, 2 * column + 1]), mistake, probabilities[mistake.row], class_names)
    return _png(figure)


def _draw_bars(
    axes: Any, mistake: Mistake, probabilities: NDArray[np.floating[Any]], class_names: Sequence[str]
) -> None:
    """One bar per likeliest class; the right class is always among them."""
    likeliest = [int(number) for number in np.argsort(-probabilities, kind="stable")[:_BARS]]
    if mistake.label not in likeliest:
        likeliest[-1] = mistake.label
    for place, number in enumerate(likeliest):
        share = float(probabilities[number])
        colour = _GREEN if number == mistake.label else _RED if number == mistake.predicted else _FAINT
        axes.barh(place, 1, color="#f3f4f6", height=0.28)
        axes.barh(place, share, color=colour, height=0.28)
        text = f"{_short(class_names[number])}  {100 * share:.1f}%"
        axes.text(0, place - 0.24, text, fontsize=7.5, color=colour, va="bottom")
    axes.set(xlim=(0, 1), ylim=(_BARS - 0.5, -0.75))
    axes.axis("off")


def _draw_curve(
    axes: Any, title: str, epochs: Sequence[int], training: Sequence[float], validation: Sequence[float]
) -> None:
    axes.plot(epochs, training, marker=".", color=_FAINT, label="training, with dropout")
    axes.plot(epochs, validation, marker=".", color=_BLUE, label="validation")
    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    axes.set_xlabel("epoch", color=_INK)
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.tick_params(colors=_INK, length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in {"left", "bottom"})
        spine.set_color(_FAINT)


def _confusion_colours(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Colours by share of the true class, on a root scale so that single mistakes show."""
    shares = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))[:, :, None]
    wrong = shares / max(float(shares[~np.eye(len(counts), dtype=bool)].max(initial=0.0)), 0.1)
    white, red, green = np.array([1.0, 1.0, 1.0]), np.array([0.97, 0.45, 0.40]), np.array([0.60, 0.85, 0.66])
    colours = white + (red - white) * wrong * 0.9 * (counts > 0)[:, :, None]
    diagonal = np.arange(len(counts))
    colours[diagonal, diagonal] = white + (green - white) * shares[diagonal, diagonal]
    clipped: NDArray[np.float64] = np.clip(colours, 0.0, 1.0)
    return clipped


def _draw_image(axes: Any, image: NDArray[np.uint8]) -> None:
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _figure(width_inches: float, height_inches: float) -> Any:
    return _libraries.figure_class()(figsize=(width_inches, height_inches), dpi=_DPI, facecolor="white")


def _png(figure: Any, *, tight: bool = False) -> bytes:
    file = io.BytesIO()
    # No software name and no date: the same figures give the same bytes.
    figure.savefig(file, format="png", bbox_inches="tight" if tight else None, metadata={"Software": None})
    return file.getvalue()
