"""A client that is closed under its callers tells each of them so."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from modelport import AsyncClient, Client, ClientClosedError, ModelChange
from tests.support.fake_server import FakeServer, RefusalError, Request


async def first_and_more(changes: AsyncIterator[ModelChange], begun: asyncio.Event) -> None:
    async for _ in changes:
        begun.set()


async def test_a_watcher_is_told() -> None:
    async with FakeServer() as server:
        client = AsyncClient(server.address)
        begun = asyncio.Event()
        watching = asyncio.create_task(first_and_more(client.watch(), begun))
        await begun.wait()
        await client.close()
        with pytest.raises(ClientClosedError):
            await watching


async def test_a_watcher_that_is_cancelled_is_cancelled() -> None:
    async with FakeServer() as server, AsyncClient(server.address) as client:
        begun = asyncio.Event()
        watching = asyncio.create_task(first_and_more(client.watch(), begun))
        await begun.wait()
        watching.cancel()
        await asyncio.wait({watching})
        assert watching.cancelled()


async def test_a_call_that_waits_for_its_next_attempt_is_told() -> None:
    refused = asyncio.Event()

    async def refuse(request: Request) -> None:
        refused.set()
        raise RefusalError(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_ms=200)

    async with FakeServer(on_request=refuse) as server:
        client = AsyncClient(server.address)
        call = asyncio.create_task(client.predict("m", {"x": np.ones(1, np.float32)}))
        await refused.wait()
        await asyncio.wait({call}, timeout=0.1)  # the refusal reaches the client
        await client.close()
        with pytest.raises(ClientClosedError):
            await call


async def test_a_blocking_watcher_may_be_closed_after_its_client() -> None:
    async with FakeServer() as server:

        def watch() -> None:
            with Client(server.address) as client:
                changes: Any = client.watch()
                next(changes)
            changes.close()

        await asyncio.to_thread(watch)


async def test_a_blocking_wait_is_told() -> None:
    async with FakeServer(healthy=False) as server:
        client = Client(server.address)
        assert not await asyncio.to_thread(client.is_ready)
        waiting = asyncio.create_task(asyncio.to_thread(client.wait_ready))
        await asyncio.wait({waiting}, timeout=0.1)
        await asyncio.to_thread(client.close)
        with pytest.raises(ClientClosedError):
            await waiting


async def test_an_abandoned_stream_ends_wherever_it_is_collected() -> None:
    async with FakeServer() as server:
        client = Client(server.address)

        def abandon() -> None:
            stream = client.predict_stream("m", ({"x": np.ones(1, np.float32)} for _ in range(99)))
            next(stream)
            cycle: list[Any] = [stream]
            cycle.append(cycle)

        async def collect() -> None:
            gc.collect()

        gc.disable()
        try:
            await asyncio.to_thread(abandon)
            loop = client._loop  # pyright: ignore[reportPrivateUsage]
            await asyncio.wait_for(asyncio.to_thread(loop.run, collect()), 10)
        finally:
            gc.enable()
        await asyncio.wait_for(server.streams_ended(), 10)
        await asyncio.to_thread(client.close)
