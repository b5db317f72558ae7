"""Peers that abuse HTTP/2 against a real server: it lives on, and whoever calls it beside them is answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from modelport import AsyncClient
from modelport_registry import Published
from modelport_server.http2 import frames
from tests.support.http2 import RawClient, prefixed, raw_client
from tests.support.server import ServerProcess, run_server, wait_for

PREDICT = "/modelport.v1.PredictionService/Predict"
STREAM = "/modelport.v1.PredictionService/PredictStream"
X = np.ones((1, 4), np.float32)
MIB = 1 << 20
BEGUN = prefixed(bytes(8 * MIB))[:1000]
"""The beginning of a message."""


def opened_and_reset(client: RawClient, number: int) -> None:
    """Gives up calls as soon as they are made, their requests whole."""
    client.call(2 * number + 1, PREDICT)
    client.message(2 * number + 1, b"")
    client.send(frames.reset(2 * number + 1, frames.CANCEL))


def headers_without_end(client: RawClient, number: int) -> None:
    """Sends headers that go on for ever."""
    client.send(frames.frame(frames.CONTINUATION if number else frames.HEADERS, 0, 1, b""))


def pings(client: RawClient, number: int) -> None:
    """Asks for signs of life, and reads none."""
    client.send(frames.frame(frames.PING, 0, 0, number.to_bytes(8, "big")))


def streams_that_wait(client: RawClient, number: int) -> None:
    """Opens streams, and says in each how long the message will be that does not come."""
    client.call(2 * number + 1, STREAM)
    client.data(2 * number + 1, BEGUN)


def garbage(client: RawClient, number: int) -> None:
    """Sends frames of all kinds, filled with anything."""
    noise = np.random.default_rng(number).integers(0, 256, 40, np.uint8).tobytes()
    client.send(frames.frame(number % 12, noise[0] & ~frames.END_HEADERS, 1, noise))


@pytest.mark.parametrize("attack", [opened_and_reset, headers_without_end, pings, streams_that_wait, garbage])
def test_others_are_answered_and_nothing_is_left(
    tmp_path: Path,
    publish_tag: Callable[[Path, str, int], Published],
    attack: Callable[[RawClient, int], None],
) -> None:
    publish_tag(tmp_path / "registry", "toy", 1)
    with run_server(tmp_path / "registry", tmp_path) as server:
        server.wait_serving("toy", 1)
        front = psutil.Process(server.process.pid)
        asyncio.run(_call(server, 20))
        before = front.num_fds(), front.memory_info().rss
        calls = asyncio.run(_beside(server, attack))
        assert calls > 0
        wait_for(lambda: front.num_fds() <= before[0], "connections to be gone", server.alive)
        assert front.memory_info().rss < before[1] + 64 * MIB
        asyncio.run(_call(server, 20))
        assert "Traceback" not in server.log.read_text()


async def _call(server: ServerProcess, number: int) -> None:
    async with AsyncClient(server.address) as client:
        for _ in range(number):
            assert (await client.predict("toy", {"x": X}))["y"].tolist() == (X * 2).tolist()


async def _beside(server: ServerProcess, attack: Callable[[RawClient, int], None]) -> int:
    """Calls while three attack, each until it is hung up on or has sent 20,000 times; returns how often it called."""
    port = int(server.address.rpartition(":")[2])
    attacks = [asyncio.create_task(_attack(port, attack)) for _ in range(3)]
    calls = 0
    async with AsyncClient(server.address) as client:
        while not all(one.done() for one in attacks):
            assert (await client.predict("toy", {"x": X}))["y"].tolist() == (X * 2).tolist()
            calls += 1
    await asyncio.gather(*attacks)
    return calls


async def _attack(port: int, attack: Callable[[RawClient, int], None]) -> None:
    async with raw_client(port) as client:
        with contextlib.suppress(ConnectionError):
            for number in range(20_000):
                attack(client, number)
                if number % 100 == 0:
                    await client.writer.drain()
                    await asyncio.sleep(0)
                    if client.reader.at_eof():
                        return
