"""The constraints file fixes a version of everything that pyproject.toml asks for, and one that it allows."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.packages import CONSTRAINTS, ROOT


def pins() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def requirements() -> Iterator[Requirement]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    lists: list[list[str]] = [project["dependencies"], *project["optional-dependencies"].values()]
    for text in (text for texts in (*lists, pyproject["build-system"]["requires"]) for text in texts):
        if (requirement := Requirement(text)).name != project["name"]:
            yield requirement


def test_every_requirement_has_a_version_that_it_allows() -> None:
    fixed = pins()
    unfit = [str(r) for r in requirements() if not r.specifier.contains(fixed.get(canonicalize_name(r.name), "0"))]
    assert not unfit, "run make lock"


def test_every_line_fixes_one_version() -> None:
    assert len(pins()) > 50
    assert all(version and " " not in version for version in pins().values())
