"""What the documents name exists: files, commands with their options, make targets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from docs.make_cli import reference
from modelport._cli_root import make_app

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))
REQUIRED_TARGETS = frozenset(("setup", "lint", "types", "test", "test-all", "demo", "bench", "protos", "image", "help"))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_MAKE = re.compile(r"(?<![\w-])make ([a-z][a-z-]*)")


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def links(text: str) -> Iterator[str]:
    """Yields the links to files, without their anchors."""
    for target in _LINK.findall(_FENCE.sub("", text)):
        path = target.partition("#")[0]
        if path and "://" not in path and not path.startswith("mailto:"):
            yield path


def commands(text: str) -> Iterator[list[str]]:
    """Yields the modelport commands of the blocks that show a shell."""
    for language, block in _FENCE.findall(text):
        if language not in {"console", "sh", "bash", "shell"}:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True) if "modelport" in line else []
            words = words[: next((i for i, word in enumerate(words) if word in {"|", ">", "&&", "&", ";"}), None)]
            shown = line.startswith("$ ") or language != "console"
            if shown and words and words[0] in {"modelport", ".venv/bin/modelport"}:
                yield words[1:]


def make_targets(text: str) -> set[str]:
    """Returns the targets that a document names in code."""
    blocks = [block for _, block in _FENCE.findall(text)]
    spans = re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
    return {target for code in (*blocks, *spans) for target in _MAKE.findall(code)}


def existing_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of every command, by its name."""
    group: Any = typer.main.get_command(make_app())
    shared = {"--help", "-h"}
    return {name: shared.union(*options_of(command)) for name, command in group.commands.items()}


def options_of(command: Any) -> Iterator[list[str]]:
    """Yields the options of a command, and of those that it groups."""
    yield from (parameter.opts + parameter.secondary_opts for parameter in command.params)
    for child in getattr(command, "commands", {}).values():
        yield from options_of(child)


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(document: Path) -> None:
    dead = [link for link in links(document.read_text()) if not (document.parent / link).exists()]
    assert not dead


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_commands_exist(document: Path, options: dict[str, set[str]]) -> None:
    for name, *arguments in commands(document.read_text()):
        if name.startswith(("-", "[")):  # an option of the root, or the usage line of the reference
            continue
        assert name in options, f"modelport {name}"
        used = {argument.partition("=")[0] for argument in arguments if re.match(r"--?[a-zA-Z]", argument)}
        assert used <= options[name], f"modelport {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_make_targets_exist(document: Path) -> None:
    assert make_targets(document.read_text()) <= existing_targets()


def test_the_makefile_has_the_targets_that_people_expect() -> None:
    assert existing_targets() >= REQUIRED_TARGETS


def test_the_examples_of_help_use_options_that_exist(options: dict[str, set[str]]) -> None:
    group: Any = typer.main.get_command(make_app())
    seen = 0
    for command in group.commands.values():
        text = f"```sh\n{re.sub(r'^ +', '', command.help or '', flags=re.MULTILINE)}\n```\n"
        for name, *arguments in commands(text):
            used = {argument.partition("=")[0] for argument in arguments if re.match(r"--?[a-zA-Z]", argument)}
            assert used <= options[name], f"modelport {name} {arguments}"
            seen += 1
    assert seen >= len(options)


def test_the_reference_of_the_command_line_is_fresh() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == reference(), "run make cli-docs"


def test_what_is_missing_is_found() -> None:
    text = "[a](nowhere.md#x) `make nothing`\n```console\n$ modelport serve --no-such \\\n  -r x | head\noutput\n```\n"
    assert list(links(text)) == ["nowhere.md"]
    assert list(commands(text)) == [["serve", "--no-such", "-r", "x"]]
    assert make_targets(text) == {"nothing"}
