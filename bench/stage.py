"""What benchmarks run against: a server in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.rpc import engines

START_S = 120.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Server:
    """``modelport serve`` in a process of its own."""

    address: str
    log: Path
    process: subprocess.Popen[bytes]

    def alive(self) -> None:
        """Ends the benchmark if the server has ended."""
        if self.process.poll() is not None:
            sys.exit(f"error: the server ended: {self.log.read_text()[-2000:]}")

    def wait_engines(self, count: int, check: Callable[[], None]) -> None:
        """Returns once ``count`` engines are left; the others would be measured with whatever comes next."""
        front = psutil.Process(self.process.pid)
        wait_for(lambda: len(engines(front)) == count, f"all but {count} engines to end", check)


def modelport(*arguments: str | Path, program: Sequence[str] = ("modelport",)) -> list[str]:
    """Returns the command line for a command of ours; ``program`` is what Python runs as a module."""
    return [sys.executable, "-m", *program, *map(str, arguments)]


@contextmanager
def serving(
    registry: Path, folder: Path, *arguments: str, program: Sequence[str] = ("modelport",)
) -> Generator[Server]:
    """Serves a registry on a Unix socket in ``folder``."""
    ready, log, address = folder / "port", folder / "server.log", f"unix:{folder}/socket"
    options = ("--registry", registry, "--address", address, "--port-file", ready)
    command = modelport("serve", *options, *arguments, program=program)
    with log.open("wb") as output:
        server = Server(address, log, subprocess.Popen(command, stdout=output, stderr=output))
    try:
        wait_for(ready.exists, "the server to listen", server.alive)
        yield server
    finally:
        server.process.terminate()
        server.process.wait()


def wait_for(
    condition: Callable[[], bool],
    what: str,
    check: Callable[[], None] = lambda: None,
    timeout_s: float = START_S,
) -> None:
    """Returns once ``condition`` holds; ends the benchmark if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        check()
        if time.monotonic() > deadline:
            sys.exit(f"error: gave up waiting for {what}")
        time.sleep(_POLL_S)


def say(text: str) -> None:
    """Tells people how far it is."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
