"""Runs the fake server as a process of its own: ``python -m tests.support.fake_server_process [ADDRESS]``.

Prints its address and answers until it is killed.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests.support.fake_server import FakeServer

_ROOT = Path(__file__).resolve().parents[2]


async def serve(address: str) -> None:
    """Serves for ever."""
    async with FakeServer(address=address) as server:
        print(server.address, flush=True)
        await asyncio.Event().wait()


class Process:
    """A fake server's process.

    Args:
        address: where to listen.
    """

    def __init__(self, address: str = "127.0.0.1:0") -> None:
        command = [sys.executable, "-m", "tests.support.fake_server_process", address]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def running(count: int = 1) -> Generator[list[Process], None, None]:
    """Runs ``count`` servers and kills them at the end."""
    servers = [Process() for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()


if __name__ == "__main__":
    asyncio.run(serve(*(sys.argv[1:] or ["127.0.0.1:0"])))
