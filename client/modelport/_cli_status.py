"""``modelport status``: what a running server says about its models."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelport.names import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from modelport import Client, ModelInfo, VersionInfo
    from modelport.cli_output import Column

_SHOWN_METRICS = 3


def status(
    model: Annotated[str | None, typer.Argument(help="The only model to show.")] = None,
    server: Annotated[
        str, typer.Option("--server", "-s", envvar="MODELPORT_SERVER", help="HOST:PORT or unix:PATH.")
    ] = DEFAULT_ADDRESS,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on and show every change.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; with --watch, a line a change.")] = False,
) -> None:
    """Show a running server's models: versions, states, aliases.

    Examples:

        modelport status

        modelport status mnist --server 10.0.0.7:8500 --watch
    """
    from modelport import Client

    with Client(server) as client:
        if watch:
            _watch(client, model or "", as_json)
            return
        models = [client.model(model)] if model else client.models()
        if as_json:
            typer.echo(json.dumps([model_json(m) for m in models], indent=2))
        else:
            _print(models)


def _watch(client: Client, model: str, as_json: bool) -> None:
    known: dict[str, ModelInfo] = {}
    for change in client.watch(model):
        if change.removed:
            known.pop(change.model.name, None)
        else:
            known[change.model.name] = change.model
        if as_json:
            typer.echo(json.dumps({**model_json(change.model), "removed": change.removed}))
            sys.stdout.flush()
        else:
            if sys.stdout.isatty():
                typer.echo("\x1b[H\x1b[2J", nl=False)  # clears the screen
            _print(known.values())


def model_json(model: ModelInfo) -> dict[str, Any]:
    """Returns a model as what JSON has."""
    return {
        "name": model.name,
        "serving_version": model.serving_version,
        "aliases": dict(model.aliases),
        "versions": [_version_json(version) for version in model.versions],
    }


def _version_json(version: VersionInfo) -> dict[str, Any]:
    return {
        "version": version.version,
        "state": version.state.value,
        "reason": version.reason,
        "since": version.since.isoformat() if version.since else None,
        "engine": version.engine,
        "engines": [
            {"engine": one.engine, "reason": one.reason, "row_ms": {str(rows): ms for rows, ms in one.row_ms.items()}}
            for one in version.engines
        ],
        "instances": version.instances,
        "threads": version.threads,
        "max_batch_size": version.max_batch_size,
        "golden_examples": version.golden_examples,
        "metrics": dict(version.metrics),
        "signatures": {
            name: {
                "inputs": [{"name": t.name, "dtype": t.dtype, "shape": t.shape} for t in signature.inputs],
                "outputs": [{"name": t.name, "dtype": t.dtype, "shape": t.shape} for t in signature.outputs],
                "batched": signature.batched,
            }
            for name, signature in version.signatures.items()
        },
    }


def _print(models: Iterable[ModelInfo]) -> None:
    from rich.markup import escape

    from modelport.cli_output import make_console, print_table

    console = make_console()
    shown = list(models)
    if not shown:
        console.print("the server has no models")
    for model in shown:
        serving = f"serves version {model.serving_version}" if model.serving_version else "serves nothing yet"
        console.print(f"[bold]{escape(model.name)}[/] {serving}")
        print_table(_columns(), [_row(model, version) for version in model.versions], console)


def _columns() -> list[Column]:
    from modelport.cli_output import Column

    return [
        Column("version"),
        Column("state"),
        Column("aliases", wraps=True),
        Column("engine", rank=3),
        Column("batches", rank=5),
        Column("golden", rank=4),
        Column("since", rank=1),
        Column("metrics", rank=2),
        Column("note", wraps=True),
    ]


def _row(model: ModelInfo, version: VersionInfo) -> list[str]:
    metrics = list(version.metrics.items())[:_SHOWN_METRICS]
    return [
        str(version.version),
        version.state.value,
        ", ".join(name for name, number in model.aliases.items() if number == version.version),
        version.engine,
        f"{version.instances} of {version.max_batch_size} rows" if version.instances else "",
        str(version.golden_examples or ""),
        f"{version.since:%Y-%m-%d %H:%M:%S}" if version.since else "",
        ", ".join(f"{name} {value:.4g}" for name, value in metrics),
        version.reason,
    ]
