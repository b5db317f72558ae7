"""``modelport predict``, and the registration of the commands that call a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer

from modelport import _cli_bench, _cli_status
from modelport.cli_output import counted
from modelport.exceptions import ModelportError
from modelport.names import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from modelport._cli_inputs import Source, SourceOptions, TensorLike
    from modelport._cli_outputs import Sink

PANEL = "Call"


class _Signature(Protocol):
    @property
    def inputs(self) -> Sequence[TensorLike]: ...
    @property
    def batched(self) -> bool: ...


class _Model(Protocol):
    """A model that can be run, here or on a server."""

    @property
    def signature(self) -> _Signature:
        """How it is called."""
        ...

    def answers(self, batches: Iterator[dict[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yields the version that answered and the outputs, batch by batch."""
        ...


def register(app: typer.Typer) -> None:
    """Adds the commands that call a server."""
    app.command("predict", rich_help_panel=PANEL)(predict)
    app.command("status", rich_help_panel=PANEL)(_cli_status.status)
    app.command("bench", rich_help_panel=PANEL)(_cli_bench.bench)


def predict(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    inputs: Annotated[
        list[Path],
        typer.Argument(help=".npy, .npz (arrays named as the inputs), IDX, PNG or JPEG files, folders of images."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write to this .npy, .npz, .jsonl or .csv file. Default: a table."),
    ] = None,
    output_format: Annotated[
        Literal["table", "npy", "npz", "jsonl", "csv"] | None,
        typer.Option("--format", help="What to write, whatever the file's name."),
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option("--server", "-s", envvar="MODELPORT_SERVER", help="HOST:PORT or unix:PATH; again for more."),
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Run the stored model here, without a server.")] = False,
    registry: Annotated[
        Path, typer.Option("--registry", "-r", envvar="MODELPORT_REGISTRY", help="The registry's folder, for --local.")
    ] = Path("models"),
    version: Annotated[int | None, typer.Option(help="The version that shall answer.")] = None,
    alias: Annotated[str | None, typer.Option(help="The alias whose version shall answer.")] = None,
    signature: Annotated[str, typer.Option(help="The signature to run. Default: serving_default.")] = "",
    outputs: Annotated[str, typer.Option(help="The outputs wanted, with commas. Default: all.")] = "",
    input_name: Annotated[str, typer.Option(help="The input that the files are for, where there are several.")] = "",
    batch_size: Annotated[int, typer.Option(min=0, help="Rows a message; 0: about 128 KiB of them.")] = 0,
    resize: Annotated[bool, typer.Option("--resize", help="Bring images to the size that the model takes.")] = False,
    progress: Annotated[
        bool | None, typer.Option("--progress/--no-progress", help="Show progress. Default: on a terminal.")
    ] = None,
) -> None:
    """Run a model on files, over a stream to a server or in this process.

    Inputs are read and outputs written piece by piece, so that there may be
    more rows than fit into memory. A server that goes away for a while is
    waited for, and every row is answered once.

    Examples:

        modelport predict mnist t10k-images-idx3-ubyte.gz -o predictions.npz

        modelport predict mnist images/ --outputs classes --format jsonl

        modelport predict mnist images.npy --local --registry models --version 3
    """
    from modelport import _cli_inputs, _cli_outputs

    wanted = [name.strip() for name in outputs.split(",") if name.strip()]
    kind = _cli_outputs.format_of(output, output_format)
    with ExitStack() as stack:
        if local:
            opened: AbstractContextManager[_Model] = _local(registry, model, version, alias, signature, wanted)
        else:
            opened = _served(server or [DEFAULT_ADDRESS], model, version, alias, signature, wanted)
        runner = stack.enter_context(opened)
        options = _cli_inputs.SourceOptions(inputs=runner.signature.inputs, input_name=input_name, resize=resize)
        sink = stack.enter_context(_cli_outputs.open_sink(output, kind, has_rows=runner.signature.batched))
        if runner.signature.batched:
            source = _cli_inputs.open_sources(inputs, options)
            _run_rows(runner, source, batch_size or _cli_inputs.batch_rows(source), sink, progress)
        else:
            _run_once(runner, inputs, options, sink, kind)


def _run_rows(runner: _Model, source: Source, batch_rows: int, sink: Sink, progress: bool | None) -> None:
    import time

    started = time.monotonic()
    rows, versions = 0, dict[int, None]()
    with _Progress(source.rows, progress) as bar:
        for version, outputs in runner.answers(source.chunks(batch_rows)):
            sink.write(outputs)
            versions[version] = None
            count = len(next(iter(outputs.values()), ()))
            rows += count
            bar.advance(count)
    elapsed_s = time.monotonic() - started
    named = ", ".join(map(str, versions)) or "none"
    typer.echo(
        f"{counted(rows, 'row')} in {elapsed_s:.2f} s ({rows / max(elapsed_s, 1e-9):,.0f} rows/s), "
        f"version{'s' if len(versions) > 1 else ''} {named}",
        err=True,
    )


def _run_once(runner: _Model, paths: Sequence[Path], options: SourceOptions, sink: Sink, kind: str) -> None:
    from modelport import _cli_inputs

    for version, outputs in runner.answers(iter([_cli_inputs.whole(paths, options)])):
        as_rows = kind not in ("npy", "npz")
        sink.write({name: array[None] for name, array in outputs.items()} if as_rows else outputs)
        typer.echo(f"1 call, version {version}", err=True)


class _Progress:
    """A bar on stderr, where it is wanted."""

    def __init__(self, total: int, wanted: bool | None) -> None:
        import sys

        self._total = total
        self._is_on = sys.stderr.isatty() if wanted is None else wanted
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Progress:
        if self._is_on:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("rows", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, rows: int) -> None:
        """Counts ``rows`` more."""
        if self._bar is not None:
            self._bar.advance(self._task, rows)


def _served(
    server: list[str], model: str, version: int | None, alias: str | None, signature: str, outputs: list[str]
) -> AbstractContextManager[_Model]:
    from modelport._cli_models import ServedModel

    return ServedModel(server, model, version=version, alias=alias, signature=signature, outputs=outputs)


def _local(
    registry: Path, model: str, version: int | None, alias: str | None, signature: str, outputs: list[str]
) -> AbstractContextManager[_Model]:
    if version is not None and alias is not None:
        raise ModelportError("give --version or --alias, not both")
    from modelport._cli_models import LocalModel

    return LocalModel(registry, model, version=version, alias=alias, signature=signature, outputs=outputs)
