"""The trainer's commands: ``train`` and ``evaluate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from modelport.progress import TELL_EVERY_S

if TYPE_CHECKING:
    from modelport_trainer._published import Answers
    from modelport_trainer.evaluation import Evaluation
    from modelport_trainer.pipeline import PipelineOptions, PublishOptions, WaitOptions

_PANEL = "Train"
_INTERRUPTED = 130
_REDRAW_EVERY_S = 1.0


_Preset = Literal["classic", "accurate"]
_Loss = Literal["crossentropy", "focal", "mse"]
_Optimizer = Literal["rmsprop", "adam", "sgd"]
_Data = Annotated[
    str | None,
    typer.Option(help="digits, mnist, fashion_mnist, or an .npz with x_train, y_train, x_test, y_test."),
]
_DataDir = Annotated[Path | None, typer.Option(help="A folder of IDX files, gzip'd or not, instead of --data.")]
_RegistryDir = Annotated[
    Path, typer.Option("--registry", "-r", envvar="MODELPORT_REGISTRY", help="The registry's folder.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def register(app: typer.Typer) -> None:
    """Adds the trainer's commands to the command line."""
    app.command("train", rich_help_panel=_PANEL)(train)
    app.command("evaluate", rich_help_panel=_PANEL)(evaluate)
    app.command("demo", rich_help_panel=_PANEL)(demo)


def train(
    model: Annotated[
        str | None, typer.Option(help="The model's name in the registry.", show_default="the data's name")
    ] = None,
    data: _Data = None,
    data_dir: _DataDir = None,
    preset: Annotated[_Preset, typer.Option(help="The network and how it is trained; accurate errs less.")] = "classic",
    filters: Annotated[
        str | None,
        typer.Option(
            help="Filters of each convolution, with commas.", show_default="32,64", rich_help_panel="Classic network"
        ),
    ] = None,
    kernel: Annotated[
        int | None,
        typer.Option(
            help="Side of a convolution's window, in pixels.", show_default="3", rich_help_panel="Classic network"
        ),
    ] = None,
    pool: Annotated[
        int | None,
        typer.Option(
            help="Side of the max-pool window; 1 for none.", show_default="2", rich_help_panel="Classic network"
        ),
    ] = None,
    pool_dropout: Annotated[
        float | None,
        typer.Option(help="Dropout after the pool.", show_default="0.25", rich_help_panel="Classic network"),
    ] = None,
    dense_units: Annotated[
        int | None,
        typer.Option(help="Units of the dense layer.", show_default="128", rich_help_panel="Classic network"),
    ] = None,
    dense_dropout: Annotated[
        float | None,
        typer.Option(help="Dropout after the dense layer.", show_default="0.5", rich_help_panel="Classic network"),
    ] = None,
    loss: Annotated[
        _Loss | None,
        typer.Option(
            help="What training minimises; classic alone.", show_default="crossentropy", rich_help_panel="Training"
        ),
    ] = None,
    optimizer: Annotated[
        _Optimizer | None,
        typer.Option(help="The optimiser; classic alone.", show_default="rmsprop", rich_help_panel="Training"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Step size; the highest one of accurate.",
            show_default="0.001, sgd 0.01, accurate 0.1",
            rich_help_panel="Training",
        ),
    ] = None,
    decay: Annotated[
        float | None,
        typer.Option(
            help="Factor on the step size after an epoch without a better validation loss; 1 keeps it; classic alone.",
            show_default="0.5",
            rich_help_panel="Training",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="The most passes over the data.", show_default="10, accurate 13", rich_help_panel="Training"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images per step.", show_default="64, accurate 128", rich_help_panel="Training"),
    ] = None,
    validation_split: Annotated[
        float | None,
        typer.Option(
            help="Share of the training images to judge epochs by.",
            show_default="0.2, accurate 0.05",
            rich_help_panel="Training",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many epochs without a better validation loss; 0: never; classic alone.",
            show_default="5",
            rich_help_panel="Training",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same machine: same result.", rich_help_panel="Training")] = 1,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="The folder to work in.", show_default="runs/MODEL-N", rich_help_panel="Run"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was interrupted.", rich_help_panel="Run")
    ] = False,
    publish: Annotated[bool, typer.Option(help="Publish the model when it is trained.", rich_help_panel="Run")] = True,
    registry: _RegistryDir = Path("models"),
    alias: Annotated[list[str] | None, typer.Option(help="Point this alias at the new version; repeatable.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A word to keep with the version; repeatable.")] = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait", help="Return when the version is in charge; 1 if it is rejected.", rich_help_panel="Run"
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(help="Wait by what this server says, not by the registry alone.", rich_help_panel="Run"),
    ] = None,
    wait_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds to wait at most.", show_default="as long as it takes", rich_help_panel="Run"),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Train an image classifier, test it, and publish it as a new version.

    The run's folder keeps a checkpoint of every epoch and a report.
    A run that was interrupted goes on when its options are repeated with --resume.

    Examples:

        modelport train

        modelport train --data mnist --epochs 10 --wait

        modelport train --data mnist --preset accurate

        modelport train --data-dir /usr/share/datasets/fashion-mnist --model fashion

        modelport train --data mnist --resume

        modelport train --data mnist --wait --wait-timeout 600
    """
    from modelport_trainer import presets
    from modelport_trainer._sources import DataSource
    from modelport_trainer.pipeline import PipelineOptions, PublishOptions

    network, training = presets.choose(
        preset,
        network=_given(
            filters=None if filters is None else _parse_filters(filters),
            kernel=kernel,
            pool=pool,
            pool_dropout=pool_dropout,
            dense_units=dense_units,
            dense_dropout=dense_dropout,
        ),
        training=_given(
            loss=loss,
            optimizer=optimizer,
            learning_rate=learning_rate,
            decay=decay,
            epochs=epochs,
            batch_size=batch_size,
            validation_split=validation_split,
            patience=patience,
            seed=seed,
        ),
    )
    source = DataSource.parse(data, data_dir)
    options = PipelineOptions(
        name=model if model is not None else source.suggested_name,
        source=source,
        preset=preset,
        network=network,
        training=training,
    )
    target = PublishOptions(
        registry=registry,
        aliases=tuple(alias or ()),
        tags=tuple(tag or ()),
        wait=_wait_options(wait and publish, server, wait_timeout),
    )
    _run(options, run_dir, target if publish else None, resume=resume, as_json=as_json)


def evaluate(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    version: Annotated[int | None, typer.Argument(help="The version.", show_default="stable, else the highest")] = None,
    server: Annotated[
        str | None,
        typer.Option(help="Ask the model as it is served at HOST:PORT, not the one in the registry."),
    ] = None,
    data: _Data = None,
    data_dir: _DataDir = None,
    report: Annotated[Path | None, typer.Option(help="Also write a report into this folder.")] = None,
    registry: _RegistryDir = Path("models"),
    as_json: _Json = False,
) -> None:
    """Test a published version on held-out images, in this process or as it is served.

    Without --data or --data-dir it takes the test images of the data that the version
    was trained on, if they can be found. With --server they are streamed to the server,
    and the registry is not read.

    Examples:

        modelport evaluate digits

        modelport evaluate mnist 3 --data-dir mnist-files --report report

        modelport evaluate mnist --server localhost:8500 --data mnist --json
    """
    from modelport_trainer import _published

    source = _published.source_for(registry, model, version, data, data_dir, served=server is not None)
    if server is None:
        answers = _published.ask_stored(registry, model, version, source)
    else:
        answers = _published.ask_server(server, model, version, source)
    evaluation = _published.judge(answers)
    page = _published.report_on(answers, evaluation, report) if report is not None else None
    _print_answers(answers, evaluation, page, as_json=as_json)


def demo(
    data: _Data = None,
    data_dir: _DataDir = None,
    first_epochs: Annotated[int, typer.Option(min=1, help="Epochs of the version that is served first.")] = 1,
    second_epochs: Annotated[int, typer.Option(min=2, help="Epochs of the version that replaces it.")] = 12,
    work_dir: Annotated[
        Path | None, typer.Option(help="An empty folder to work in.", show_default="a new temporary one")
    ] = None,
) -> None:
    """See it all: train, publish, serve, call, and replace the model under load without a failed call.

    Examples:

        modelport demo

        modelport demo --data-dir mnist-files --second-epochs 3
    """
    from rich.console import Console

    from modelport_trainer._sources import DataSource
    from modelport_trainer.demo import Demo, DemoOptions
    from modelport_trainer.errors import OptionError

    if second_epochs == first_epochs:
        raise OptionError("--first-epochs and --second-epochs must differ: the second version should be better")
    options = DemoOptions(
        source=DataSource.parse(data, data_dir),
        first_epochs=first_epochs,
        second_epochs=second_epochs,
        work_dir=work_dir,
    )
    status = Demo(options, Console(highlight=False)).run()
    if status:
        raise typer.Exit(status)


def _wait_options(wait: bool, server: str | None, timeout_s: float | None) -> WaitOptions | None:
    from modelport_trainer.errors import OptionError
    from modelport_trainer.pipeline import WaitOptions

    if wait:
        every_s = _REDRAW_EVERY_S if sys.stderr.isatty() else TELL_EVERY_S
        return WaitOptions(server=server, timeout_s=timeout_s, progress_every_s=every_s)
    if server is not None or timeout_s is not None:
        raise OptionError("--server and --wait-timeout go with --publish --wait")
    return None


def _run(
    options: PipelineOptions,
    run_dir: Path | None,
    publish: PublishOptions | None,
    *,
    resume: bool,
    as_json: bool,
) -> None:
    from modelport_trainer._console import ConsoleListener
    from modelport_trainer.pipeline import run_pipeline
    from modelport_trainer.run import RunFolder, next_run_dir

    if run_dir is None:
        run_dir = next_run_dir(Path("runs"), options.name, resume=resume)
    listener = ConsoleListener(results=not as_json)
    try:
        outcome = run_pipeline(options, RunFolder(run_dir), listener, publish=publish, resume=resume)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; go on with --resume --run-dir {run_dir}", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    finally:
        listener.close()
    if as_json:
        typer.echo(json.dumps(outcome.to_json(), indent=2))


def _print_answers(answers: Answers, evaluation: Evaluation, page: Path | None, *, as_json: bool) -> None:
    if as_json:
        values = answers.to_json() | {"report": None if page is None else str(page)}
        typer.echo(json.dumps(values | {"evaluation": evaluation.to_json()}, indent=2))
        return
    from rich.console import Console

    from modelport_trainer._console import print_evaluation

    console = Console(highlight=False)
    print_evaluation(console, evaluation)
    versions = ", ".join(str(version) for version in answers.versions)
    console.print(
        f"{answers.model}/{versions}, {answers.asked}: {evaluation.rows:,} images of {answers.dataset.source} "
        f"in {answers.duration_s:.1f} s, {evaluation.rows / answers.duration_s:,.0f} rows/s",
        soft_wrap=True,
    )
    if answers.trained_on_this is False:
        typer.echo("note: this is not the data that the version was trained and first tested on", err=True)
    if page is not None:
        console.print(f"report: {page}", soft_wrap=True)


def _given(**options: object) -> dict[str, object]:
    """Returns the options that were given; the others are for the preset to say."""
    return {name: value for name, value in options.items() if value is not None}


def _parse_filters(text: str) -> tuple[int, ...]:
    from modelport_trainer.errors import OptionError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--filters {text}: give whole numbers with commas between, for example 32,64") from None
