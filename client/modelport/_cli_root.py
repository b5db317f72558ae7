"""The root of the command line: finds the commands that are installed."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Any

import typer

from modelport.exceptions import ModelportError

_COMMANDS = "modelport.commands"
_ORDER = ("trainer", "registry", "server", "client")
_BROUGHT_BY = {"train": "trainer", "evaluate": "trainer", "demo": "trainer", "serve": "server", "verify": "server"}


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"modelport {metadata.version('modelport')}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take TensorFlow models from training to traffic: train, publish, serve, predict."""


def make_app(command: str = "") -> typer.Typer:
    """Returns the root with every command that is installed.

    Args:
        command: what is going to be run, if that is known: where it is one of a room that takes long to start, no
            other room is imported for it.
    """
    app = typer.Typer(
        name="modelport",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    app.callback()(root)
    entries = sorted(metadata.entry_points(group=_COMMANDS), key=_place)
    its = [entry for entry in entries if entry.name == _BROUGHT_BY.get(command)]
    for entry in its or entries:
        _add(app, entry)
    return app


def _add(app: typer.Typer, entry: metadata.EntryPoint) -> None:
    """Adds a room's commands; where what they need is not installed, commands that say so."""
    try:
        register = entry.load()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("modelport", "typer")):
            raise
        for name in (n for n, extra in _BROUGHT_BY.items() if extra == entry.name):
            _add_hint(app, name, entry.name)
        return
    register(app)


def _add_hint(app: typer.Typer, name: str, extra: str) -> None:
    needs = f"needs: pip install 'modelport[{extra}]'"

    def missing() -> None:
        raise ModelportError(f"{name} {needs}")

    settings: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    app.command(name, help=needs.replace("[", r"\["), context_settings=settings)(missing)


def _place(entry: metadata.EntryPoint) -> tuple[int, str]:
    return (_ORDER.index(entry.name) if entry.name in _ORDER else len(_ORDER), entry.name)
