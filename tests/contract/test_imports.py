"""The import table of docs/architecture.md: which package may import which, and who may import what is heavy."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

OURS = {
    "modelport": frozenset[str](),
    "modelport_registry": frozenset({"modelport"}),
    "modelport_server": frozenset({"modelport", "modelport_registry"}),
    "modelport_trainer": frozenset({"modelport", "modelport_registry"}),
}
"""What of ours each package may import, itself aside."""

FOLDERS = {
    "modelport": ROOT / "client" / "modelport",
    "modelport_registry": ROOT / "registry" / "modelport_registry",
    "modelport_server": ROOT / "server" / "modelport_server",
    "modelport_trainer": ROOT / "trainer" / "modelport_trainer",
}

BASE = frozenset({"grpc", "google", "numpy"})
COMMAND_LINE = frozenset({"typer", "rich", "PIL", "matplotlib"})
OTHERS = {
    "modelport": BASE | {"ml_dtypes"},
    "modelport_registry": BASE,
    "modelport_server": BASE | {"grpc_health", "grpc_reflection", "hpack", "ml_dtypes", "prometheus_client", "uvloop"},
    "modelport_trainer": BASE | {"matplotlib", "ml_dtypes", "sklearn"},
}
"""What of others' each package may import, besides the command line's in its command line's modules."""

TENSORFLOW = frozenset({"tensorflow", "keras"})
TENSORFLOW_ALLOWED = ("modelport_server.engines.tensorflow_engine", "modelport_trainer")
OPENVINO_ALLOWED = "modelport_server.engines.openvino_engine"
NNCF_ALLOWED = "modelport_server.engines.int8"


@dataclass(frozen=True, slots=True)
class Import:
    """One name that a module imports."""

    module: str
    line: int
    name: str

    @property
    def top(self) -> str:
        """The name's first part."""
        return self.name.partition(".")[0]


def imports_of(module: str, source: str) -> Iterator[Import]:
    """Yields what a module imports anywhere in it, by statement or by name; relative imports are its own."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (Import(module, node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=str(name), level=0):
                yield Import(module, node.lineno, name)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(module, node.lineno, name)
            case _:
                pass


def fault(found: Import) -> str | None:
    """Returns what is wrong with an import, or None."""
    package = found.module.partition(".")[0]
    if found.top == package or found.top in sys.stdlib_module_names:
        return None
    if found.top in OURS:
        return None if found.top in OURS[package] else f"{package} may not import {found.top}"
    if found.top in TENSORFLOW:
        allowed = any(found.module == name or found.module.startswith(f"{name}.") for name in TENSORFLOW_ALLOWED)
        return None if allowed else f"only {' and '.join(TENSORFLOW_ALLOWED)} may import {found.top}"
    if found.top == "openvino":
        return None if found.module == OPENVINO_ALLOWED else f"only {OPENVINO_ALLOWED} may import openvino"
    if found.top == "nncf":
        return None if found.module == NNCF_ALLOWED else f"only {NNCF_ALLOWED} may import nncf"
    is_command_line = any("cli" in part.split("_") or part == "_console" for part in found.module.split("."))
    others: set[str] = {*OTHERS[package]}
    if is_command_line or package == "modelport_trainer":
        others |= COMMAND_LINE
    return None if found.top in others else f"{found.module} may not import {found.top}"


def module_name(package: str, path: Path) -> str:
    parts = path.relative_to(FOLDERS[package].parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("package", OURS)
def test_a_package_imports_only_what_the_table_allows(package: str) -> None:
    paths = sorted(FOLDERS[package].rglob("*.py"))
    assert paths
    faults = [
        f"{path.relative_to(ROOT)}:{found.line}: {why}"
        for path in paths
        for found in imports_of(module_name(package, path), path.read_text())
        if (why := fault(found))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("modelport._client", "import modelport_registry"),
        ("modelport_registry._publish", "def f():\n    from modelport_server.app import run"),
        ("modelport_trainer.pipeline", "import modelport_server.local"),
        ("modelport_server.app", "import modelport_trainer"),
        ("modelport_server.engines.worker", "import importlib\nimportlib.import_module('tensorflow')"),
        ("modelport_registry._saved_model", "import keras.src"),
        ("modelport._client", "import typer"),
        ("modelport_server.engines.worker", "import nncf"),
        ("modelport_registry._files", "import google.protobuf, requests"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert [why for found in imports_of(module, source) if (why := fault(found))]
