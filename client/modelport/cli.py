"""The root of the command line."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points


def main() -> None:
    """Runs the command line."""
    import typer

    from modelport.exceptions import ModelportError

    app = typer.Typer(no_args_is_help=True)
    for point in entry_points(group="modelport.commands"):
        try:
            register = point.load()
        except ImportError:
            continue
        register(app)
    try:
        app()
    except ModelportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
