"""What the trainer's commands print: results on standard output, progress on standard error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from modelport.cli_output import counted

if TYPE_CHECKING:
    from modelport_registry import Published
    from modelport_trainer.data import DataReport
    from modelport_trainer.evaluation import Evaluation
    from modelport_trainer.model import Layer
    from modelport_trainer.training import EpochResult, TrainingResult

_BAR_WIDTH = 20
_MOST_CLASSES_IN_MATRIX = 20


class ConsoleListener:
    """Prints what each step of a pipeline comes to."""

    def __init__(self, *, results: bool = True) -> None:
        """Prints tables only if ``results`` is true; progress in any case."""
        self._out = Console(highlight=False, quiet=not results)
        self._err = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._epochs = 0
        self._status: Status | None = None

    def close(self) -> None:
        """Takes away what is drawn of something that is under way."""
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def data_loaded(self, report: DataReport) -> None:
        """Prints what the data was found to be."""
        self._out.print(data_table(report))
        for removal in report.removed:
            self._out.print(f"removed from {removal.split}: {counted(removal.rows, 'row')}, {removal.reason}")
        for note in report.notes:
            self._out.print(f"noticed: {note}")

    def model_built(self, layers: Sequence[Layer]) -> None:
        """Prints the model's layers."""
        self._out.print(layer_table(layers))

    def epoch_started(self, epoch: int, epochs: int, steps: int) -> None:
        """Begins a bar for the epoch where standard error is a terminal."""
        self._epochs = epochs
        if not self._err.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR_WIDTH),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._err,
            transient=True,
        )
        self._task = self._progress.add_task(f"epoch {epoch:>{len(str(epochs))}}/{epochs}", total=steps)
        self._progress.start()

    def step_done(self, step: int) -> None:
        """Moves the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def epoch_done(self, result: EpochResult, *, best: bool) -> None:
        """Prints the epoch's line."""
        self.close()
        width = len(str(self._epochs))
        filled = round(_BAR_WIDTH * result.epoch / self._epochs)
        bar = "━" * filled + "[dim]" + "─" * (_BAR_WIDTH - filled) + "[/dim]"
        self._err.print(
            f"epoch {result.epoch:>{width}}/{self._epochs} {bar} {result.duration_s:6.1f} s"
            f"  loss {result.loss:.4f}  accuracy {result.accuracy:.4f}"
            f"  validation: loss {result.val_loss:.4f}  accuracy {result.val_accuracy:.4f}"
            f"{'  best' if best else ''}",
            soft_wrap=True,
        )

    def trained(self, result: TrainingResult) -> None:
        """Prints how training ended."""
        self.close()
        early = ", stopped early" if result.stopped_early else ""
        resumed = f", resumed after epoch {result.resumed_after}" if result.resumed_after else ""
        epochs = counted(len(result.history), "epoch")
        self._err.print(f"trained {epochs}{early}{resumed}; kept the weights of epoch {result.best_epoch}")

    def tested(self, evaluation: Evaluation, report: Path) -> None:
        """Prints the test's figures."""
        print_evaluation(self._out, evaluation)
        self._out.print(f"report: {report}", soft_wrap=True)

    def published(self, published: Published) -> None:
        """Prints what was published."""
        manifest = published.manifest
        size = sum(entry.size for entry in manifest.files)
        self._out.print(
            f"published {published.model}/{published.version}: {len(manifest.files)} files, {size / 1e6:.1f} MB, "
            f"{manifest.golden} golden examples, in {published.path}",
            soft_wrap=True,
        )
        for warning in published.warnings:
            self._err.print(f"warning: {warning}", soft_wrap=True)

    def already_published(self, name: str, version: int) -> None:
        """Says that there was nothing new to publish."""
        self._out.print(f"already published as {name}/{version}")

    def waiting(self, name: str, version: int, phase: str) -> None:
        """Shows how far the version has got: in one line on a terminal, in a line each elsewhere."""
        text = Text(f"{name}/{version}: {phase}")
        if not self._err.is_terminal:
            self._err.print(text, soft_wrap=True)
        elif self._status is None:
            self._status = self._err.status(text)
            self._status.start()
        else:
            self._status.update(text)


def data_table(report: DataReport) -> Table:
    """Returns what was found in train and test, side by side."""
    table = Table("data", title=f"Data: {report.source}, {len(report.class_names)} classes", title_justify="left")
    for name in ("train", "test"):
        table.add_column(name, justify="right")
    train, test = report.train, report.test
    rows: list[tuple[str, str, str]] = [
        ("rows as read", f"{train.rows:,}", f"{test.rows:,}"),
        ("image", _image(train.image_shape, train.dtype), _image(test.image_shape, test.dtype)),
        ("pixel values", f"{train.lowest} to {train.highest}", f"{test.lowest} to {test.highest}"),
        ("mean pixel", f"{train.mean:.1f}", f"{test.mean:.1f}"),
        ("rows per class", _span(train.rows_per_class), _span(test.rows_per_class)),
        ("unlabelled", f"{train.unlabelled:,}", f"{test.unlabelled:,}"),
        ("constant images (empty)", f"{train.constant:,} ({train.empty:,})", f"{test.constant:,} ({test.empty:,})"),
        ("repeated images", f"{train.duplicates:,}", f"{test.duplicates:,}"),
        ("also in the other", f"{report.duplicates_across:,}", ""),
        ("in two classes", f"{report.contradictions:,}", ""),
        ("rows after cleaning", f"{report.train_rows:,}", f"{report.test_rows:,}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def layer_table(layers: Sequence[Layer]) -> Table:
    """Returns a model's layers with their output shapes and parameters."""
    total = sum(layer.parameters for layer in layers)
    table = Table("layer", "kind", "output", title=f"Model: {total:,} parameters", title_justify="left")
    table.add_column("parameters", justify="right")
    for layer in layers:
        shape = " x ".join("batch" if size is None else str(size) for size in layer.output_shape)
        table.add_row(layer.name, layer.kind, shape, f"{layer.parameters:,}")
    return table


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Prints a test's figures: per class, averaged, and the confusion matrix."""
    console.print(_score_table(evaluation))
    if len(evaluation.confusion) <= _MOST_CLASSES_IN_MATRIX:
        console.print(_confusion_table(evaluation))
    console.print(
        f"accuracy {evaluation.accuracy:.4f}, loss {evaluation.loss:.4f}, "
        f"{len(evaluation.mistakes):,} of {evaluation.rows:,} wrong"
    )


def _score_table(evaluation: Evaluation) -> Table:
    table = Table("class", title=f"Test: {evaluation.rows:,} images", title_justify="left")
    for name in ("precision", "recall", "F1", "images"):
        table.add_column(name, justify="right")
    scored = [(scores.name, scores, f"{scores.rows:,}") for scores in evaluation.per_class]
    averages = [("micro average", evaluation.micro, ""), ("macro average", evaluation.macro, "")]
    for place, (name, scores, rows) in enumerate([*scored, *averages], start=1):
        table.add_row(
            name,
            f"{scores.precision:.4f}",
            f"{scores.recall:.4f}",
            f"{scores.f1:.4f}",
            rows,
            end_section=place == len(scored),
        )
    return table


def _confusion_table(evaluation: Evaluation) -> Table:
    names = [scores.name for scores in evaluation.per_class]
    table = Table("is \\ said", title="Confusion matrix", title_justify="left", padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, justify="right")
    for number, (name, counts) in enumerate(zip(names, evaluation.confusion, strict=True)):
        cells = [
            f"[green]{count}[/green]" if column == number else f"[red]{count}[/red]" if count else "[dim]·[/dim]"
            for column, count in enumerate(counts)
        ]
        table.add_row(name, *cells)
    return table


def _image(shape: tuple[int, int], dtype: str) -> str:
    return f"{shape[0]} x {shape[1]} {dtype}"


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts):,} to {max(counts):,}"
