"""The command line's reference is what the commands say of themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_reference_is_fresh() -> None:
    code = "import runpy, sys; sys.stdout.write(runpy.run_path('docs/make_cli.py')['reference']())"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert made.stdout == (ROOT / "docs" / "cli.md").read_text(), "run make cli-docs"
