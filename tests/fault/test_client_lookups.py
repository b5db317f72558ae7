"""Hosts of several servers are looked up once, and nothing stands still meanwhile."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from modelport import AsyncClient, ClientClosedError, InputError
from modelport._channel import channel_target
from tests.support.fake_server import FakeServer


class SlowNames:
    """A resolver that answers when it is told to; it notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.begun = threading.Event()
        self.answer = threading.Event()

    def __call__(self, host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:
        self.asked.append(host)
        self.begun.set()
        if not self.answer.wait(5):
            raise OSError(0, "the event loop stands still")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowNames]:
    """Takes the place of the system's resolver."""
    slow = SlowNames()
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    yield slow
    slow.answer.set()


def named(*servers: FakeServer) -> list[str]:
    return [f"{name}.example:{server.address.rpartition(':')[2]}" for name, server in zip("ab", servers, strict=True)]


async def test_the_event_loop_goes_on_while_hosts_are_looked_up(names: SlowNames) -> None:
    async with FakeServer() as first, FakeServer() as second, AsyncClient(named(first, second)) as client:
        calls = [asyncio.create_task(client.predict("m", {"x": np.ones(1, np.float32)})) for _ in range(3)]
        await asyncio.to_thread(names.begun.wait)
        names.answer.set()
        for call in calls:
            assert (await call)["y"] == 2
        asked = len(names.asked)
        results = [r async for r in client.predict_stream("m", [{"x": np.ones(1, np.float32)}])]
        assert results[0].prediction["y"] == 2
        assert len(names.asked) == asked
        assert set(names.asked) == {"a.example", "b.example"}


async def test_a_client_may_be_closed_while_hosts_are_looked_up(names: SlowNames) -> None:
    client = AsyncClient(["a.example:1", "b.example:2"])
    call = asyncio.create_task(client.is_ready())
    await asyncio.to_thread(names.begun.wait)
    await client.close()
    names.answer.set()
    with pytest.raises(ClientClosedError):
        await call


async def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await channel_target(["a.example:1"]) == "a.example:1"
    assert await channel_target(["127.0.0.1:1", "127.0.0.2:1", "127.0.0.1:1"]) == "ipv4:127.0.0.1:1,127.0.0.2:1"
    assert await channel_target(["127.0.0.1:1", "[::1]:2"]) == "ipv6:[::ffff:127.0.0.1]:1,[::1]:2"

    def unknown(*arguments: Any, **options: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(InputError, match=r"host 'b\.example': Name or service not known"):
        await channel_target(["127.0.0.1:1", "b.example:2"])
