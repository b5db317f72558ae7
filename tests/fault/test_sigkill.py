"""The server killed five times during one stream: the caller gets every row once, in order."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from modelport import Client
from modelport_registry import Published
from tests.support.server import ServerProcess

ROWS = 20_000
ROWS_PER_BATCH = 50
KILLS = 5
MODEL = "versioned"


class Restarting:
    """A server that can be killed and started again on the same port."""

    def __init__(self, registry: Path, scratch: Path) -> None:
        self._registry = registry
        self._scratch = scratch
        self._server = ServerProcess(registry, scratch, ())
        self._server.wait_listening()
        self._server.wait_serving(MODEL)
        self._port = self._server.port
        self.address = self._server.address

    def kill_and_restart(self) -> None:
        """Kills the server at once; the next one comes up while callers already try."""
        assert self._server.stop(signal.SIGKILL) == -signal.SIGKILL
        self._server = ServerProcess(self._registry, self._scratch, (), self._port)

    def stop(self) -> int:
        self._server.wait_listening()
        return self._server.stop()


@pytest.fixture
def server(tmp_path: Path, publish_tag: Callable[[Path, str, int], Published]) -> Iterator[Restarting]:
    publish_tag(tmp_path / "registry", MODEL, 1)
    server = Restarting(tmp_path / "registry", tmp_path)
    yield server
    assert server.stop() == 0


@pytest.mark.timeout(1200)  # six servers load one after another
def test_a_stream_survives_five_kills(server: Restarting) -> None:
    x = np.arange(ROWS * 4, dtype=np.float32).reshape(ROWS, 4)
    batches = ({"x": x[first : first + ROWS_PER_BATCH]} for first in range(0, ROWS, ROWS_PER_BATCH))
    count = ROWS // ROWS_PER_BATCH
    kill_at = {count * (kill + 1) // (KILLS + 1) for kill in range(KILLS)}
    assert len(kill_at) == KILLS
    answers: list[np.ndarray[tuple[int, int], np.dtype[np.float32]]] = []
    with Client(server.address) as client:
        for result in client.predict_stream(MODEL, batches, resume_timeout_s=120):
            assert result.index == len(answers)
            answers.append(result.prediction["y"])
            if result.index in kill_at:
                server.kill_and_restart()
    np.testing.assert_array_equal(np.concatenate(answers), x * 2)
