"""Writes ``docs/cli.md`` from the commands' own help; ``make cli-docs`` runs it, a contract test compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_HEAD = """# The command line

Made by `make cli-docs` from the commands' own help: change that, not this file.
`modelport --install-completion` sets up completion for your shell.

"""


def reference() -> str:
    """Returns the reference of all commands as Markdown."""
    import typer.cli
    import typer.main

    from modelport._cli_root import make_app

    api: Any = typer.cli
    command: Any = typer.main.get_command(make_app())
    context = command.context_class(command, info_name="modelport")
    text: str = api.get_docs_for_click(obj=command, ctx=context, name="modelport")
    lines = [line.rstrip() for line in text.splitlines()[2:]]
    return _HEAD + "\n".join(lines).strip() + "\n"


def main() -> None:
    """Writes the file."""
    (Path(__file__).parent / "cli.md").write_text(reference())


if __name__ == "__main__":
    main()
