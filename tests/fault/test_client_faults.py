"""The SDK while connections break and servers die, hang, drain and refuse."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from modelport import AsyncClient, Client, ClientClosedError, Keepalive, ModelportError, RetryPolicy, StreamResult
from tests.support.fake_server import FakeServer, Proxy, RefusalError, Request
from tests.support.fake_server_process import Process, running

QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.05)


def batches(count: int, width: int = 1) -> Iterator[dict[str, Any]]:
    return ({"x": np.full(width, number, np.float32)} for number in range(count))


def check(results: list[StreamResult], count: int) -> None:
    assert [result.index for result in results] == list(range(count))
    assert [float(result.prediction["y"][0]) for result in results] == [2.0 * n for n in range(count)]


async def collected(stream: AsyncIterator[StreamResult]) -> list[StreamResult]:
    return [result async for result in stream]


@pytest.mark.parametrize("seed", range(6))
async def test_every_batch_is_answered_once_in_order_under_random_cuts(seed: int) -> None:
    chance = random.Random(seed)
    width = chance.choice([1, 2000, 30000])
    server = FakeServer()
    async with server, Proxy(lambda: server.address) as proxy, AsyncClient(proxy.address, retry=QUICK) as client:

        async def cut(request: Request) -> None:
            if chance.random() < 0.03:
                proxy.cut()
            if chance.random() < 0.2:
                await asyncio.sleep(0)

        server.on_request = cut
        stream = client.predict_stream("m", batches(400, width), window=chance.randint(1, 12))
        check(await collected(stream), 400)
    assert server.streams > 1


@pytest.mark.parametrize("seed", range(4))
async def test_every_batch_is_answered_once_in_order_whatever_the_server_does(seed: int) -> None:
    chance = random.Random(100 + seed)
    server = FakeServer()
    restarts: set[asyncio.Task[None]] = set()
    refused: dict[int, int] = {}

    async def restart() -> None:
        await server.kill()
        await server.start()

    def refuse(request: Request) -> None:
        refused[request.sequence] = refused.get(request.sequence, 0) + 1
        if refused[request.sequence] <= 2:
            codes = [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE]
            raise RefusalError(chance.choice(codes), "later", retry_after_ms=2)

    async def misbehave(request: Request) -> None:
        luck = chance.random()
        if luck < 0.01 and not restarts:
            task = asyncio.create_task(restart())
            restarts.add(task)
            task.add_done_callback(restarts.discard)
            await asyncio.Event().wait()
        elif luck < 0.03:
            server.drain()
        elif luck < 0.05:
            server.retire(server.serving, successor=server.serving + 1)
        elif luck < 0.08:
            refuse(request)

    server.on_request = misbehave
    retry = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.05, budget=1000)
    async with server, AsyncClient(server.address, retry=retry) as client:
        results = await collected(client.predict_stream("m", batches(400), window=chance.randint(1, 12)))
        check(results, 400)
        await asyncio.gather(*restarts)
    assert all(set(r.prediction["version"].tolist()) == {r.prediction.version} for r in results)


async def test_a_server_killed_five_times_in_one_stream() -> None:
    process = Process()
    kills = 0
    try:
        async with AsyncClient(process.address, retry=QUICK) as client:
            results: list[StreamResult] = []
            async for result in client.predict_stream("m", batches(1000)):
                results.append(result)
                if result.index in (0, 100, 101, 400, 997):
                    process.kill()
                    kills += 1
                    process = await asyncio.to_thread(Process, process.address)
        check(results, 1000)
        assert kills == 5
    finally:
        process.kill()


def test_a_stopped_server_is_noticed_and_the_other_one_takes_over() -> None:
    with running(2) as servers:
        keepalive = Keepalive(time_s=1, timeout_s=1)
        with Client([s.address for s in servers], keepalive=keepalive, retry=QUICK, timeout_s=60) as client:
            client.wait_ready()
            for server in servers:
                seen: list[StreamResult] = []
                for result in client.predict_stream("m", batches(200), resume_timeout_s=60):
                    seen.append(result)
                    if result.index == 50:
                        server.process.send_signal(signal.SIGSTOP)
                check(seen, 200)
                for _ in range(4):
                    assert client.predict("m", {"x": np.ones(1, np.float32)})["y"][0] == 2
                server.process.send_signal(signal.SIGCONT)


async def test_calls_go_to_the_servers_that_are_up_and_healthy() -> None:
    async with FakeServer() as first, FakeServer() as second, FakeServer(healthy=False) as third:
        addresses = [first.address, second.address, third.address]
        async with AsyncClient(addresses, retry=QUICK) as client:
            await client.wait_ready()
            while not (first.requests and second.requests):
                await client.predict("m", {"x": np.ones(1, np.float32)})
            assert third.requests == []
            await first.kill()
            for _ in range(20):
                await client.predict("m", {"x": np.ones(1, np.float32)})
            check(await collected(client.predict_stream("m", batches(50))), 50)
        assert third.requests == []


async def test_unary_calls_survive_a_restart_without_a_failure() -> None:
    server = FakeServer()
    async with server, AsyncClient(server.address) as client:

        async def call(number: int) -> float:
            answer = await client.predict("m", {"x": np.full(1, number, np.float32)})
            return float(answer["y"][0])

        async def calls(first: int) -> list[float]:
            return [await call(number) for number in range(first, first + 50)]

        working = [asyncio.create_task(calls(100 * n)) for n in range(8)]
        await server.seen(40)
        await server.kill()
        await server.start()
        for number, answers in enumerate(await asyncio.gather(*working)):
            assert answers == [2.0 * (100 * number + n) for n in range(50)]


async def test_memory_is_constant_over_a_long_stream() -> None:
    import gc

    alive = 0

    class Counted(np.ndarray[Any, Any]):
        def __new__(cls, number: int) -> Counted:
            nonlocal alive
            alive += 1
            return np.full(100, number, np.float32).view(cls)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    peak = 0
    async with FakeServer() as server, AsyncClient(server.address) as client:
        server.requests = _Dropping()
        async for _ in client.predict_stream("m", ({"x": Counted(n)} for n in range(3000)), window=8):
            peak = max(peak, alive)
    gc.collect()
    assert peak <= 40
    assert alive <= 2


class _Dropping(list[Request]):
    def append(self, item: Request) -> None:
        pass


def test_closing_a_client_ends_the_calls_of_other_threads() -> None:
    def call(client: Client, errors: list[BaseException]) -> None:
        try:
            while True:
                client.predict("m", {"x": np.ones(1, np.float32)})
        except ModelportError as error:
            errors.append(error)

    with running() as (server,):
        for _ in range(20):
            client = Client(server.address)
            errors: list[BaseException] = []
            threads = [threading.Thread(target=call, args=(client, errors)) for _ in range(4)]
            for thread in threads:
                thread.start()
            client.predict("m", {"x": np.ones(1, np.float32)})
            client.close()
            for thread in threads:
                thread.join(20)
                assert not thread.is_alive()
            assert [type(error) for error in errors] == [ClientClosedError] * 4


def test_an_interrupt_ends_a_blocking_call() -> None:
    with running() as (server,), Client(server.address) as client:
        client.wait_ready()
        main = threading.main_thread().ident
        assert main is not None
        interrupted: Callable[[], None] = lambda: signal.pthread_kill(main, signal.SIGINT)  # noqa: E731
        server.process.send_signal(signal.SIGSTOP)
        timer = threading.Timer(0.2, interrupted)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            client.predict("m", {"x": np.ones(1, np.float32)})
        timer.join()
        server.process.send_signal(signal.SIGCONT)
        assert client.predict("m", {"x": np.ones(1, np.float32)}).version == 1
