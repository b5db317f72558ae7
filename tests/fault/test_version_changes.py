"""Version changes under load: nothing fails, and every answer is that of the version it names."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from modelport import AsyncClient, Prediction
from modelport_registry import Published
from tests.support.server import ServerProcess, run_server

UNARY_CALLERS = 16
MODEL = "versioned"
PAUSE_S = 0.02
"""Between two calls of a caller: sixteen that never pause would leave a niced loader no time on two cores."""


@dataclass
class Caller:
    """What one caller saw."""

    versions: list[int] = field(default_factory=list[int])
    _moved: asyncio.Event = field(default_factory=asyncio.Event)

    async def seen(self, version: int) -> None:
        """Returns once the newest answer is from ``version``."""
        while not self.versions or self.versions[-1] != version:
            self._moved.clear()
            await self._moved.wait()

    def check(self, x: np.ndarray[tuple[int, int], np.dtype[np.float32]], answer: Prediction) -> None:
        """Takes an answer in, which must be right for the version that it names: versions publish their number."""
        np.testing.assert_array_equal(answer["y"], x * 2)
        np.testing.assert_array_equal(answer["version"], np.full(len(x), answer.version))
        if not self.versions or self.versions[-1] != answer.version:
            self.versions.append(answer.version)
            self._moved.set()


def rows(number: int, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Returns rows that no other call sends."""
    return (np.arange(count * 4, dtype=np.float32) + number % 100_000).reshape(count, 4)


async def call(client: AsyncClient, caller: Caller, stop: asyncio.Event, first: int) -> None:
    number = first
    while not stop.is_set():
        number += UNARY_CALLERS
        x = rows(number, 1 + number % 5)
        caller.check(x, await client.predict(MODEL, {"x": x}))
        await asyncio.sleep(PAUSE_S)


async def stream(client: AsyncClient, caller: Caller, stop: asyncio.Event, *, follow: bool) -> None:
    sent: list[np.ndarray[tuple[int, int], np.dtype[np.float32]]] = []

    async def batches() -> AsyncIterator[dict[str, np.ndarray[tuple[int, int], np.dtype[np.float32]]]]:
        while not stop.is_set():
            sent.append(rows(len(sent), 1 + len(sent) % 7))
            yield {"x": sent[-1]}
            await asyncio.sleep(PAUSE_S)

    answered = 0
    async for result in client.predict_stream(MODEL, batches(), follow=follow):
        assert result.index == answered
        caller.check(sent[result.index], result.prediction)
        answered += 1
    assert answered == len(sent)


async def publish_all(
    server: ServerProcess,
    root: Path,
    publish_tag: Callable[[Path, str, int], Published],
    tasks: list[asyncio.Task[None]],
    last: int,
) -> None:
    """Publishes one version after another, each once the one before has taken over."""
    for number in range(2, last + 1):
        await asyncio.to_thread(publish_tag, root, MODEL, number)
        await asyncio.to_thread(server.wait_serving, MODEL, number)
        for task in tasks:
            if task.done():
                task.result()  # a caller that failed ends the test here, with its own error


@pytest.mark.timeout(1200)  # engines load one after another, at the lowest priority
@pytest.mark.parametrize("changes", [5, pytest.param(20, marks=pytest.mark.slow)])
async def test_version_changes_under_load(
    tmp_path: Path, publish_tag: Callable[[Path, str, int], Published], changes: int
) -> None:
    root, last = tmp_path / "registry", changes + 1
    publish_tag(root, MODEL, 1)
    unary = [Caller() for _ in range(UNARY_CALLERS)]
    followers, pinned = [Caller(), Caller()], [Caller(), Caller()]
    stop = asyncio.Event()
    with run_server(root, tmp_path) as server:
        await asyncio.to_thread(server.wait_serving, MODEL, 1)
        async with AsyncClient(server.address) as client:
            tasks = [asyncio.create_task(call(client, caller, stop, n)) for n, caller in enumerate(unary)]
            tasks += [asyncio.create_task(stream(client, caller, stop, follow=True)) for caller in followers]
            tasks += [asyncio.create_task(stream(client, caller, stop, follow=False)) for caller in pinned]
            try:
                await publish_all(server, root, publish_tag, tasks, last)
                on_last = [caller.seen(last) for caller in unary + followers]
                await asyncio.wait_for(asyncio.gather(*on_last), 60)
            finally:
                stop.set()
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [outcome for outcome in outcomes if outcome is not None] == []
        assert server.stop() == 0
    for caller in unary + followers:
        assert caller.versions == sorted(caller.versions), "versions went back"
        assert caller.versions[-1] == last
    assert Counter(version for caller in followers for version in caller.versions).keys() >= {1, last}
    assert [caller.versions for caller in pinned] == [[1], [1]]
