"""Which code trained a model."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

_GIT_LIMIT_S = 10


def code_revision() -> str:
    """Returns the git commit of this package's source, else the version of the installed package.

    ``-dirty`` follows the commit if files of this package differ from it.
    """
    folder = Path(__file__).parent
    try:
        # A site-packages folder may lie in a repository of somebody else's: ask whether it tracks this file.
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return f"modelport {importlib.metadata.version('modelport')}"
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],  # noqa: S607 - whichever git the caller has on the PATH
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_LIMIT_S,
    )
    return done.stdout.strip()
