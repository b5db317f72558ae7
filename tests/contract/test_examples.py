"""The examples run, against a server as they expect it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.packages import ROOT, must_run, run
from tests.support.server import run_server

SMALL = ["--epochs", "1", "--filters", "4", "--dense-units", "8"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a small digits classifier."""
    folder = tmp_path_factory.mktemp("digits")
    registry = folder / "registry"
    command = [sys.executable, "-m", "modelport", "train"]
    must_run(*command, "--registry", registry, "--run-dir", folder / "run", *SMALL, cwd=folder)
    return registry


def copy_for(port: int, name: str, folder: Path) -> Path:
    """Returns a copy of an example that calls another port than the usual one."""
    source = (ROOT / "examples" / name).read_text()
    assert "127.0.0.1:8500" in source
    path = folder / name
    path.write_text(source.replace("127.0.0.1:8500", f"127.0.0.1:{port}"))
    return path


def test_call_digits(digits: Path, tmp_path: Path) -> None:
    with run_server(digits, tmp_path) as server:
        server.wait_serving("digits", 1)
        shown = must_run(sys.executable, copy_for(server.port, "call_digits.py", tmp_path))
    assert re.match(r"version 1 says \[\d \d \d \d\], in [\d.]+ ms\n1000 rows came back from the stream\n", shown)


def test_an_example_without_a_server_says_so(tmp_path: Path) -> None:
    failed = run(sys.executable, copy_for(1, "call_digits.py", tmp_path))
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert failed.stderr.startswith("error: ")
