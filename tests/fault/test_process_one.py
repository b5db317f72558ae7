"""The server as the first process of a container, where every engine's parent is process 1."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modelport_registry import Published
from tests.support.server import wait_for

NAMESPACE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child=SIGTERM"]


def test_engines_live_under_process_one(tmp_path: Path, publish_tag: Callable[[Path, str, int], Published]) -> None:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let us make a process namespace")
    publish_tag(tmp_path / "registry", "toy", 1)
    serve = [sys.executable, "-m", "modelport", "serve", "--registry", str(tmp_path / "registry")]
    with (tmp_path / "log").open("wb") as log:
        command = [*NAMESPACE, *serve, "--address", "127.0.0.1:0"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            ended = ("toy@1: serving", "toy@1: rejected")
            wait_for(lambda: any(text in said(tmp_path) for text in ended), "the version to come up")
            assert "toy@1: serving" in said(tmp_path)
            assert "can't be forked" not in said(tmp_path)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def said(folder: Path) -> str:
    """Returns the server's log."""
    return (folder / "log").read_text()
