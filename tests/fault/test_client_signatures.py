"""Lists in a stream while the model begins to be called otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np

from modelport import AsyncClient, InvalidArgumentError, StreamResult
from modelport.v1 import model_pb2
from tests.support.fake_server import FakeServer, RefusalError, Request, signature, spec

_WINDOW = 4


class Typed(FakeServer):
    """Version 1 takes float32, every later one float64; it counts how often it is asked for the model."""

    asked = 0

    async def __aenter__(self) -> Typed:
        await self.start()
        return self

    def model(self) -> model_pb2.Model:
        """Returns the model with a signature for each version."""
        self.asked += 1
        model = super().model()
        for version in model.versions:
            dtype = dtype_of(version.version)
            sign = signature([spec("x", dtype, -1)], [spec("y", dtype, -1)])
            version.signatures[0].CopyFrom(sign)
        return model

    def run_typed(self, inputs: Any, version: int) -> Any:
        """Doubles numbers of the version's type and refuses all others."""
        if inputs["x"].dtype != dtype_of(version):
            raise RefusalError(grpc.StatusCode.INVALID_ARGUMENT, f"x is {inputs['x'].dtype}")
        return {"y": 2 * inputs["x"]}


def dtype_of(version: int) -> str:
    return "float32" if version == 1 else "float64"


def typed() -> Typed:
    server = Typed()
    server.run = server.run_typed
    return server


def versions(results: list[StreamResult]) -> list[int]:
    return [r.prediction.version for r in results if r.error is None]


def refused(results: list[StreamResult]) -> list[int]:
    assert all(isinstance(r.error, InvalidArgumentError | None) for r in results)
    return [r.index for r in results if r.error is not None]


async def test_a_stream_that_follows_learns_the_new_version_s_types() -> None:
    async with typed() as server, AsyncClient(server.address) as client:
        lists = ([1.5] for _ in range(40))
        results: list[StreamResult] = []
        async for result in client.predict_stream("m", lists, follow=True, window=_WINDOW, on_error="return"):
            results.append(result)
            if result.index == 9:
                server.publish(2)
        assert len(refused(results)) <= 2 * _WINDOW
        assert versions(results)[-20:] == [2] * 20


async def test_a_stream_keeps_to_the_types_of_the_version_that_it_is_on() -> None:
    async with typed() as server, AsyncClient(server.address) as client:
        results: list[StreamResult] = []
        async for result in client.predict_stream("m", ([1.5] for _ in range(40)), window=_WINDOW):
            results.append(result)
            if result.index == 9:
                server.publish(2)
                assert (await client.predict("m", [1.5])).version == 2  # the client knows the new types now
        assert versions(results) == [1] * 40
        assert server.asked <= 3


async def test_a_stream_whose_version_is_retired_learns_the_next_one_s_types() -> None:
    async with typed() as server, AsyncClient(server.address) as client:
        results: list[StreamResult] = []
        async for result in client.predict_stream("m", ([1.5] for _ in range(40)), window=_WINDOW, on_error="return"):
            results.append(result)
            if result.index == 9:
                server.retire(1, successor=2)
        assert len(refused(results)) <= 2 * _WINDOW
        assert versions(results)[-20:] == [2] * 20


async def test_a_stream_tells_other_calls_that_the_version_has_changed() -> None:
    async with typed() as server, AsyncClient(server.address) as client:
        await client.predict("m", [1.5])
        server.publish(2)

        async def batches() -> AsyncIterator[Any]:
            yield {"x": np.array([1.5])}

        async for result in client.predict_stream("m", batches()):
            assert result.prediction.version == 2
        seen = len(server.requests)
        assert (await client.predict("m", [1.5]))["y"].dtype == np.float64
        assert len(server.requests) == seen + 1  # it was right at once


async def test_parts_have_the_time_that_their_call_has() -> None:
    given: list[Any] = []

    class Spy(AsyncClient):
        def bulk_call(self, target: Any, batches: Any, options: Any) -> Any:
            given.append(options)
            return super().bulk_call(target, batches, options)

    async with FakeServer() as server, Spy(server.address, max_message_bytes=64 << 10) as client:
        rows = np.ones(40_000, np.float32)
        assert (await client.predict("m", {"x": rows}, timeout_s=3600))["y"].shape == (40_000,)
        assert 3000 < given[0].answer_timeout_s <= 3600

        async def hang(request: Request) -> None:
            await asyncio.Event().wait()

        server.on_request = hang
        call = asyncio.create_task(client.predict("m", {"x": rows}, timeout_s=600))
        await server.seen(len(server.requests) + 1)
        assert 0 < given[1].answer_timeout_s <= 600
        call.cancel()
        await asyncio.wait({call})
