"""Wheels and environments of their own, for tests of what a user gets to install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CONSTRAINTS = ROOT / "constraints.txt"


def run(
    *command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None, user: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, whatever that is."""
    arguments = [str(part) for part in command]
    settings = {**os.environ, **(env or {})}
    return subprocess.run(arguments, cwd=cwd, env=settings, user=user, capture_output=True, text=True, check=False)


def must_run(*command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """Runs a command that has to succeed and returns its output."""
    result = run(*command, cwd=cwd, env=env)
    assert result.returncode == 0, f"{command}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout


def build_wheel(folder: Path, source: Path = ROOT) -> Path:
    """Builds an sdist from the sources and the wheel from the sdist, as for an upload; returns the wheel."""
    must_run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, python: str = sys.executable) -> Path:
    """Makes an empty virtual environment and returns its interpreter."""
    must_run(python, "-m", "venv", "--without-pip", folder)
    return folder / "bin" / "python"


def install(python: Path, *requirements: str | Path) -> None:
    """Installs into an environment, at the versions of the constraints file."""
    must_run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python),
        *("install", "--quiet", "--constraint", CONSTRAINTS, *requirements),
    )


def public_python() -> str | None:
    """Returns an interpreter of this one's version that every user of the machine may run, if there is one."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    here = Path(sys.base_prefix) / "bin" / name
    for found in (str(here), shutil.which(name, path="/usr/local/bin:/usr/bin")):
        if found is not None and all(folder.stat().st_mode & 0o001 for folder in Path(found).resolve().parents):
            return found
    return None
