"""What importing the SDK and asking for help load, and what is said when an extra is not installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEAVY = {
    "tensorflow",
    "keras",
    "openvino",
    "sklearn",
    "scipy",
    "matplotlib",
    "grpc",
    "numpy",
    "google",
    "PIL",
    "uvloop",
}
EVERY_NAME = """
import modelport, modelport_registry
for package in (modelport, modelport_registry):
    for name in package.__all__:
        getattr(package, name)
"""
PRINT_MODULES = """
import json, sys
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def loaded(result: subprocess.CompletedProcess[str]) -> set[str]:
    """Returns the top-level packages that a process printed with PRINT_MODULES."""
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in json.loads(result.stderr.splitlines()[-1])}


def base_distributions() -> set[str]:
    """Returns the distributions that an installation without extras has."""
    found: set[str] = set()
    waiting = ["modelport"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def without_extras() -> str:
    """Returns code that makes everything which the extras bring look as if it were not installed."""
    base = base_distributions()
    hidden = sorted(
        package
        for package, owners in metadata.packages_distributions().items()
        if not base & {canonicalize_name(owner) for owner in owners}
    )
    assert {"typer", "rich", "tensorflow", "keras", "sklearn", "matplotlib"} <= set(hidden)
    return f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def help_modules(arguments: Sequence[str]) -> set[str]:
    code = "from modelport.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
    return loaded(run(code + PRINT_MODULES, *arguments))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["serve", "--help"], ["verify", "--help"], ["predict", "--help"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert help_modules(arguments) & HEAVY == set()


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("serve", {"modelport_trainer", "modelport_registry"}),
        ("verify", {"modelport_trainer", "modelport_registry"}),
        ("evaluate", {"modelport_server", "modelport_registry"}),
    ],
)
def test_a_command_does_not_load_rooms_that_it_does_not_take(command: str, absent: set[str]) -> None:
    assert help_modules([command, "--help"]) & absent == set()


def test_help_names_the_commands_of_every_room() -> None:
    shown = subprocess.run([sys.executable, "-m", "modelport", "--help"], capture_output=True, text=True, check=True)
    names = set(re.findall(r"^\W*([a-z]+)  ", shown.stdout, re.MULTILINE))
    assert {
        "train",
        "evaluate",
        "publish",
        "models",
        "show",
        "check",
        "verify",
        "alias",
        "gc",
        "serve",
        "predict",
    } <= names


def test_importing_the_sdk_and_the_registry_needs_no_extra() -> None:
    tops = loaded(run(without_extras() + EVERY_NAME + PRINT_MODULES))
    assert {"modelport", "modelport_registry", "grpc", "numpy"} <= tops


def test_importing_the_sdk_loads_no_extra_that_is_installed() -> None:
    tops = loaded(run(EVERY_NAME + PRINT_MODULES))
    base = base_distributions()
    owners = metadata.packages_distributions()
    extra = {top for top in tops if top in owners and not base & {canonicalize_name(o) for o in owners[top]}}
    by_grpc_itself = {"grpc_health", "grpc_reflection"}  # it looks for them when it is imported
    assert extra - by_grpc_itself - {"_distutils_hack"} == set()


def test_the_command_without_its_extra_says_what_to_install() -> None:
    result = run(without_extras() + "from modelport.cli import main\nmain()")
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "modelport[cli]" in result.stderr
