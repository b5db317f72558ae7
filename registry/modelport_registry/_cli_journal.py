"""``modelport journal``: what was done to a model, by the registry or by a server on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Protocol, cast

import typer

from modelport.cli_output import print_json
from modelport_registry._cli import DEFAULT_ROOT, PANEL, ModelArgument, RegistryOption
from modelport_registry._cli_server import ServerOption, check_one_place
from modelport_registry.transitions import STABLE

_MOST_FROM_SERVER = 1000
_DIGEST_SHOWN = 12


class _Entry(Protocol):
    """A line of the journal, from the registry or from a server."""

    @property
    def time(self) -> datetime: ...
    @property
    def action(self) -> str: ...
    @property
    def version(self) -> int | None: ...
    @property
    def actor(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def details(self) -> Mapping[str, Any]: ...


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command("journal", rich_help_panel=PANEL)(journal)


def journal(
    context: typer.Context,
    model: ModelArgument,
    registry: RegistryOption = DEFAULT_ROOT,
    server: ServerOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, one entry a line.")] = False,
) -> None:
    """Print what was done to a model, when, by whom and why.

    --json has all of it: the figures of every gate, and the numbers behind every decision.

    Examples:

        modelport journal mnist

        modelport journal mnist --json

        modelport journal mnist --server 10.0.0.7:8500
    """
    check_one_place(context, server)
    entries = _of_registry(registry, model) if server is None else _of_server(server, model)
    if as_json:
        print_json([_document(entry) for entry in entries])
    else:
        _print(entries)


def _of_registry(registry: Path, model: str) -> Sequence[_Entry]:
    from modelport_registry import Registry

    store = Registry(registry)
    entries = store.journal(model)
    if not entries:
        store.resolve(model)  # says so if there is no such model
    return entries


def _of_server(server: str, model: str) -> Sequence[_Entry]:
    from modelport import Client

    with Client(server) as client:
        entries = client.rollouts.journal(model, limit=_MOST_FROM_SERVER)
    if len(entries) == _MOST_FROM_SERVER:
        typer.echo(f"the newest {_MOST_FROM_SERVER} entries; for older ones see the registry itself", err=True)
    return entries[::-1]


def _document(entry: _Entry) -> dict[str, Any]:
    return {
        "time": entry.time.isoformat(),
        "action": entry.action,
        "version": entry.version,
        "actor": entry.actor,
        "reason": entry.reason,
        "details": dict(entry.details),
    }


def _print(entries: Sequence[_Entry]) -> None:
    """Prints a table, or where that has no room some lines for each entry."""
    from modelport.cli_output import Column, fits, make_console, print_table

    console = make_console()
    columns = [Column(name) for name in ("time", "action", "version", "actor", "reason", "details")]
    rows = [_row(entry) for entry in entries]
    if fits(columns, rows, console):
        print_table(columns, rows, console)
        return
    from rich.padding import Padding
    from rich.text import Text

    for time, action, version, actor, reason, details in rows:
        what = f"  {action}{f' version {version}' if version else ''}"
        console.print(Text.assemble((time, "dim"), (what, "bold"), f"  by {actor}"))
        for text in filter(None, (reason, details)):
            console.print(Padding(Text(text), (0, 0, 0, 2)))


def _row(entry: _Entry) -> list[str]:
    return [
        f"{entry.time:%Y-%m-%d %H:%M:%S}",
        entry.action,
        "" if entry.version is None else str(entry.version),
        entry.actor,
        entry.reason,
        " ".join(_detail(name, value) for name, value in entry.details.items()),
    ]


def _detail(name: str, value: object) -> str:
    """Returns a detail in a few characters; what does not fit is in the JSON."""
    if name == STABLE and isinstance(value, Mapping):
        change = cast("Mapping[str, object]", value)
        return f"stable={change.get('before') or 'none'}->{change.get('after') or 'none'}"
    if name == "aliases" and isinstance(value, Sequence):
        return f"aliases={','.join(map(str, cast('Sequence[object]', value)))}"
    if value is None:
        return f"{name}=none"
    if name.endswith("sha256"):
        return f"{name}={str(value)[:_DIGEST_SHOWN]}"
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str)):
        return f"{name}=({len(cast('Sequence[object]', value))})"
    return f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
