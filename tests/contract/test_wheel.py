"""What a user gets: the wheel's contents and metadata, and an installation without extras."""

from __future__ import annotations

import zipfile
from configparser import ConfigParser
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.packages import ROOT, build_wheel, install, make_environment, must_run, run

PACKAGES = ("modelport", "modelport_registry", "modelport_server", "modelport_trainer")

EVERYTHING_PUBLIC = """
import sys
import modelport, modelport_registry
for package in (modelport, modelport_registry):
    for name in package.__all__:
        getattr(package, name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def dist_info(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def metadata_of(wheel: Path) -> Message:
    return Parser().parsestr(dist_info(wheel, "METADATA"))


def test_the_wheel_needs_three_packages(wheel: Path) -> None:
    requirements = [Requirement(text) for text in metadata_of(wheel).get_all("Requires-Dist", [])]
    unconditional = {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert unconditional == {"grpcio", "protobuf", "numpy"}


@pytest.mark.parametrize("extra", ["server", "trainer", "all", "dev"])
def test_extras_bring_tensorflow(wheel: Path, extra: str) -> None:
    requirements = [Requirement(text) for text in metadata_of(wheel).get_all("Requires-Dist", [])]
    waiting, found = [extra], set[str]()
    while waiting:
        name = waiting.pop()
        for requirement in requirements:
            if requirement.marker is not None and requirement.marker.evaluate({"extra": name}):
                waiting += requirement.extras if requirement.name == "modelport" else ()
                found.add(requirement.name)
    assert {"tensorflow", "typer"} <= found


def test_the_wheel_has_the_packages_and_nothing_else(names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    assert not {name for name in names if name.endswith((".pyc", ".proto"))}


def test_the_wheel_is_typed(names: set[str]) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    stubs = {name for name in names if name.endswith(("_pb2.py", "_pb2_grpc.py"))}
    assert len(stubs) >= 6
    assert {f"{name}i" for name in stubs} <= names


def test_the_wheel_has_every_module_of_the_sources(names: set[str]) -> None:
    sources = {
        path.relative_to(ROOT / folder).as_posix()
        for folder, package in zip(("client", "registry", "server", "trainer"), PACKAGES, strict=True)
        for path in (ROOT / folder / package).rglob("*.py")
    }
    assert sources <= names


def test_the_wheel_says_its_licence(wheel: Path, names: set[str]) -> None:
    assert metadata_of(wheel)["License-Expression"] == "Apache-2.0"
    (licence,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
    with zipfile.ZipFile(wheel) as archive:
        assert b"Apache License" in archive.read(licence)


def test_every_entry_point_leads_to_a_module(wheel: Path, names: set[str]) -> None:
    parser = ConfigParser(delimiters=("=",))
    parser.read_string(dist_info(wheel, "entry_points.txt"))
    targets = [target.partition(":")[0] for section in parser.sections() for _, target in parser.items(section)]
    assert len(targets) >= 5
    assert {f"{target.replace('.', '/')}.py" for target in targets} <= names


def test_an_installation_without_extras(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv")
    install(python, wheel)
    loaded = set(must_run(python, "-c", EVERYTHING_PUBLIC, cwd=tmp_path).split())
    assert {"modelport", "modelport_registry", "grpc", "numpy"} <= loaded
    assert not loaded & {"tensorflow", "keras", "typer", "rich", "sklearn", "matplotlib", "PIL", "ml_dtypes"}
    command = run(python.with_name("modelport"), "--help", cwd=tmp_path)
    assert command.returncode == 1
    assert command.stderr.splitlines() == ["the command line needs: pip install 'modelport[cli]'"]
