"""Calls that wait at the same moment go in one message, and each ends as it would have ended by itself."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest

from modelport import (
    AsyncClient,
    Client,
    ClientClosedError,
    DeadlineExceededError,
    InvalidArgumentError,
    ModelportError,
    Prediction,
    ResourceExhaustedError,
    RetryPolicy,
    RpcError,
    UnavailableError,
)
from modelport._joining import Joiner
from modelport._threads import LoopThread
from tests.support.fake_server import FakeServer, RefusalError, Request, StreamResponse, signature, spec
from tests.support.server import wait_for

QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)
FAILING = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


def x(number: int) -> dict[str, Any]:
    """Returns inputs that tell whose they are."""
    return {"x": np.array([number], np.float32)}


def number_of(request: Request) -> int:
    """Returns the number that ``x`` was given."""
    return int(np.frombuffer(request.inputs[0].data, np.float32)[0])


async def together(client: AsyncClient, count: int, **options: Any) -> list[Prediction | BaseException]:
    """Makes calls at the same moment and returns how each ended."""
    calls = [client.predict("m", x(number), **options) for number in range(count)]
    return await asyncio.gather(*calls, return_exceptions=True)


def answers(outcomes: list[Prediction | BaseException]) -> list[float]:
    """Returns the answers, which must all be there."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [float(outcome["y"][0]) for outcome in outcomes if isinstance(outcome, Prediction)]


def raised(outcome: Prediction | BaseException) -> tuple[Any, ...]:
    """Returns everything that an error says."""
    assert isinstance(outcome, RpcError)
    return type(outcome), str(outcome), outcome.code, outcome.details, outcome.retry_after_s


async def test_calls_at_the_same_moment_go_in_one_message() -> None:
    async with FakeServer() as server, AsyncClient(server.address) as client:
        assert answers(await together(client, 20)) == [2 * number for number in range(20)]
    assert server.messages == [19]  # the first was alone when it was made
    assert len(server.requests) == 20


async def test_a_lone_call_goes_by_itself() -> None:
    async with FakeServer() as server, AsyncClient(server.address) as client:
        for number in range(3):
            await client.predict("m", x(number))
    assert (server.messages, len(server.requests)) == ([], 3)


async def test_a_call_beside_one_that_is_under_way_goes_by_itself_too() -> None:
    go_on = asyncio.Event()

    async def wait_for_the_second(request: Request) -> None:
        if number_of(request) == 1:
            await go_on.wait()

    async with FakeServer(on_request=wait_for_the_second) as server, AsyncClient(server.address) as client:
        first = asyncio.create_task(client.predict("m", x(1)))
        await server.seen(1)
        await client.predict("m", x(2))
        go_on.set()
        await first
    assert server.messages == []


async def test_an_answer_does_not_wait_for_those_it_went_with() -> None:
    go_on = asyncio.Event()

    async def hold_the_third(request: Request) -> None:
        if number_of(request) == 3:
            await go_on.wait()

    async with FakeServer(on_request=hold_the_third) as server, AsyncClient(server.address) as client:
        tasks = [asyncio.create_task(client.predict("m", x(number))) for number in range(8)]
        await asyncio.wait([task for number, task in enumerate(tasks) if number != 3])
        assert not tasks[3].done()
        go_on.set()
        assert (await tasks[3])["y"].tolist() == [6]
    assert server.messages == [7]


@pytest.mark.parametrize(
    ("calls", "messages"), [(33, [32]), (34, [32, 1]), (101, [50, 50]), (401, [128, 128, 128, 16])]
)
async def test_many_calls_go_in_several_messages(calls: int, messages: list[int]) -> None:
    async with FakeServer() as server, AsyncClient(server.address) as client:
        assert len(answers(await together(client, calls))) == calls
    assert sorted(server.messages) == sorted(size for size in messages if size > 1)  # one alone goes by itself


async def test_large_calls_go_alone() -> None:
    large = {"x": np.ones(200_000, np.float32)}
    async with FakeServer() as server, AsyncClient(server.address) as client:
        calls = [client.predict("m", large) for _ in range(6)]
        assert all(answer["y"].shape == (200_000,) for answer in await asyncio.gather(*calls))
    assert server.messages == []


async def test_a_message_is_bounded_by_its_bytes() -> None:
    middling = {"x": np.ones(50_000, np.float32)}
    async with FakeServer() as server, AsyncClient(server.address) as client:
        await asyncio.gather(*[client.predict("m", middling) for _ in range(11)])
    assert server.messages == [5, 5]


async def test_small_limits_hold_for_joined_calls_too() -> None:
    some = {"x": np.ones(250, np.float32)}
    options = [("grpc.max_receive_message_length", 4096), ("grpc.max_send_message_length", 16384)]
    server = FakeServer(options=options)
    async with server, AsyncClient(server.address, max_message_bytes=8192) as client:
        for _ in range(2):  # the server takes less than what the client would join
            calls = [client.predict("m", some) for _ in range(20)]
            assert all(len(answer["y"]) == 250 for answer in await asyncio.gather(*calls))


async def test_every_call_asks_for_what_it_asks_for() -> None:
    server = FakeServer(versions={1, 2}, serving=2, aliases={"old": 1})
    async with server, AsyncClient(server.address) as client:
        outcomes = await asyncio.gather(
            client.predict("m", x(0)),
            client.predict("m", x(1), version=1),
            client.predict("m", x(2), alias="old"),
            client.predict("m", x(3), routing_key="k", outputs=["y"], signature="s"),
            client.predict("m", x(4), version=9),
            return_exceptions=True,
        )
    assert server.messages == [4]
    assert [getattr(outcome, "version", None) for outcome in outcomes] == [2, 1, 1, 2, None]
    assert list(outcomes[3]) == ["y"]  # type: ignore[arg-type]
    assert raised(outcomes[4])[2] is grpc.StatusCode.NOT_FOUND
    third = next(request for request in server.requests if number_of(request) == 3)
    assert (third.routing_key, third.signature, list(third.outputs)) == ("k", "s", ["y"])


async def test_a_server_without_the_call_is_asked_once() -> None:
    async with FakeServer(knows_many=False) as server, AsyncClient(server.address) as client:
        for _ in range(3):
            assert answers(await together(client, 20)) == [2 * number for number in range(20)]
    assert server.messages == [19]
    assert len(server.requests) == 60


@pytest.mark.parametrize("pushback_ms", [None, 1])
@pytest.mark.parametrize("code", FAILING)
async def test_an_error_is_the_one_that_the_call_gets_by_itself(code: grpc.StatusCode, pushback_ms: int | None) -> None:
    async def refuse_odd_ones(request: Request) -> None:
        if number_of(request) % 2:
            raise RefusalError(code, "because", retry_after_ms=pushback_ms)

    async with FakeServer(on_request=refuse_odd_ones) as server, AsyncClient(server.address, retry=QUICK) as client:
        (alone,) = await asyncio.gather(client.predict("m", x(1)), return_exceptions=True)
        outcomes = await together(client, 6)
    assert server.messages == [5]
    assert answers(outcomes[::2]) == [0, 4, 8]
    assert [raised(outcome) for outcome in outcomes[1::2]] == [raised(alone)] * 3


@pytest.mark.parametrize(
    ("code", "pushback_ms"),
    [
        (grpc.StatusCode.UNAVAILABLE, None),
        (grpc.StatusCode.UNAVAILABLE, 20),
        (grpc.StatusCode.CANCELLED, None),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 20),
    ],
)
async def test_what_may_pass_is_tried_again(code: grpc.StatusCode, pushback_ms: int | None) -> None:
    refused: dict[int, int] = {}

    async def refuse_twice(request: Request) -> None:
        number = number_of(request)
        refused[number] = refused.get(number, 0) + 1
        if number % 3 == 2 and refused[number] < 3:
            raise RefusalError(code, retry_after_ms=pushback_ms)

    async with FakeServer(on_request=refuse_twice) as server, AsyncClient(server.address, retry=QUICK) as client:
        assert answers(await together(client, 9)) == [2 * number for number in range(9)]
    assert refused == {number: 3 if number % 3 == 2 else 1 for number in range(9)}


async def test_nothing_is_tried_again_without_retries() -> None:
    async def refuse(request: Request) -> None:
        raise RefusalError(grpc.StatusCode.UNAVAILABLE, retry_after_ms=1)

    retry = RetryPolicy(max_attempts=1)
    async with FakeServer(on_request=refuse) as server, AsyncClient(server.address, retry=retry) as client:
        outcomes = await together(client, 5)
    assert [type(outcome) for outcome in outcomes] == [UnavailableError] * 5
    assert len(server.requests) == 5


async def test_a_full_server_is_asked_as_often_as_for_a_lone_call() -> None:
    async def full(request: Request) -> None:
        raise RefusalError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_ms=1)

    async with FakeServer(on_request=full) as server, AsyncClient(server.address, retry=QUICK) as client:
        outcomes = await together(client, 3)
    assert [type(outcome) for outcome in outcomes] == [ResourceExhaustedError] * 3
    assert len(server.requests) == 3 * QUICK.max_attempts


async def test_each_call_has_its_own_deadline() -> None:
    go_on = asyncio.Event()

    async def hang(request: Request) -> None:
        await go_on.wait()

    async with FakeServer(on_request=hang) as server, AsyncClient(server.address) as client:
        lone = asyncio.create_task(client.predict("m", x(0), timeout_s=0.1))
        short = [asyncio.create_task(client.predict("m", x(1), timeout_s=0.1)) for _ in range(2)]
        long = [asyncio.create_task(client.predict("m", x(2))) for _ in range(2)]
        ended = await asyncio.gather(lone, *short, return_exceptions=True)
        assert [raised(outcome) for outcome in ended] == [raised(ended[0])] * 3
        assert isinstance(ended[0], DeadlineExceededError)
        go_on.set()
        assert [answer["y"].tolist() for answer in await asyncio.gather(*long)] == [[4], [4]]
    assert server.messages == [4]


async def test_a_deadline_of_all_calls_passes() -> None:
    async def hang(request: Request) -> None:
        await asyncio.Event().wait()

    async with FakeServer(on_request=hang) as server, AsyncClient(server.address) as client:
        outcomes = await together(client, 5, timeout_s=0.1)
    assert [type(outcome) for outcome in outcomes] == [DeadlineExceededError] * 5


async def test_the_server_is_told_each_calls_time() -> None:
    times: list[float] = []

    class Noting(FakeServer):
        async def _result(self, index: int, joined: Any) -> Any:
            times.append(joined.timeout_us / 1e6)
            return await super()._result(index, joined)

    async with Noting() as server, AsyncClient(server.address) as client:
        calls = [client.predict("m", x(0), timeout_s=timeout_s) for timeout_s in (1, 20, 30, 40)]
        await asyncio.gather(*calls)
    assert [round(time, -1) for time in times] == [20, 30, 40]


async def test_cancelling_a_call_leaves_the_others_alone() -> None:
    go_on = asyncio.Event()

    async def wait(request: Request) -> None:
        await go_on.wait()

    async with FakeServer(on_request=wait) as server, AsyncClient(server.address) as client:
        tasks = [asyncio.create_task(client.predict("m", x(number))) for number in range(6)]
        await server.seen(6)
        tasks[0].cancel()
        tasks[3].cancel()
        await asyncio.wait(tasks[::3])
        go_on.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == [True, False, False] * 2
    assert answers([outcomes[number] for number in (1, 2, 4, 5)]) == [2, 4, 8, 10]


async def test_a_call_that_is_cancelled_before_it_is_sent_is_not_sent() -> None:
    async with FakeServer() as server, AsyncClient(server.address) as client:
        await client.predict("m", x(0))
        tasks = [asyncio.create_task(client.predict("m", x(number))) for number in range(4)]
        await asyncio.sleep(0)  # each has begun
        tasks[2].cancel()
        await asyncio.wait(tasks)
    assert tasks[2].cancelled()
    assert sorted(number_of(request) for request in server.requests) == [0, 0, 1, 3]


async def test_a_message_that_nobody_waits_for_is_given_up() -> None:
    given_up = asyncio.Event()

    async def hang(request: Request) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if number_of(request):
                given_up.set()
            raise

    async with FakeServer(on_request=hang) as server, AsyncClient(server.address) as client:
        tasks = [asyncio.create_task(client.predict("m", x(number))) for number in range(4)]
        await server.seen(4)
        for task in tasks:
            task.cancel()
        await asyncio.wait_for(given_up.wait(), 20)


async def test_closing_the_client_ends_joined_calls() -> None:
    async def hang(request: Request) -> None:
        await asyncio.Event().wait()

    async with FakeServer(on_request=hang) as server:
        client = AsyncClient(server.address)
        tasks = [asyncio.create_task(client.predict("m", x(number))) for number in range(5)]
        await server.seen(5)
        unsent = [asyncio.create_task(client.predict("m", x(number))) for number in range(5)]
        await asyncio.sleep(0)
        await client.close()
        outcomes = await asyncio.gather(*tasks, *unsent, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ClientClosedError] * 10


async def test_a_connection_that_breaks_half_way() -> None:
    broken = False

    async def break_at_the_last(request: Request) -> None:
        nonlocal broken
        if number_of(request) == 9 and not broken:
            broken = True
            await some_answered.wait()
            restarting.append(asyncio.create_task(restart()))
            await asyncio.Event().wait()

    async def restart() -> None:
        await server.kill()
        await server.start()

    some_answered = asyncio.Event()
    restarting: list[asyncio.Task[None]] = []
    server = FakeServer(on_request=break_at_the_last)
    async with server, AsyncClient(server.address) as client:
        tasks = [asyncio.create_task(client.predict("m", x(number))) for number in range(10)]
        await asyncio.wait(tasks[:9])
        some_answered.set()
        assert answers(await asyncio.gather(*tasks, return_exceptions=True)) == [2 * n for n in range(10)]
        await asyncio.gather(*restarting)
    assert len(server.requests) == 11


async def test_nobody_there_is_said_to_each() -> None:
    async with FakeServer() as server:
        address = server.address
    async with AsyncClient(address, retry=QUICK) as client:
        outcomes = await together(client, 5)
    text = f"no server answers at {address} (connection refused); is `modelport serve` running?"
    assert [(type(outcome), str(outcome)) for outcome in outcomes] == [(UnavailableError, text)] * 5


async def test_nobody_there_is_said_at_once_without_retries() -> None:
    async with FakeServer() as server:
        pass
    async with AsyncClient(server.address, retry=RetryPolicy(max_attempts=1)) as client:
        outcomes = await together(client, 5)
    assert [raised(outcome) for outcome in outcomes[1:]] == [raised(outcomes[0])] * 4


async def test_a_damaged_answer_is_its_callers_own() -> None:
    async def damaged(request: Request) -> StreamResponse | None:
        if number_of(request) != 2:
            return None
        response = StreamResponse()
        response.response.outputs.add(name="y", dtype=11, shape=[3], data=b"123")  # pyright: ignore[reportArgumentType]
        return response

    async with FakeServer(on_request=damaged) as server, AsyncClient(server.address) as client:
        outcomes = await together(client, 5)
    assert isinstance(outcomes[2], ModelportError)
    assert "the server's answer is damaged" in str(outcomes[2])
    assert len(answers(outcomes[:2] + outcomes[3:])) == 4


def has_handed_over(client: Client, count: int) -> bool:
    """Returns whether so many calls of threads wait for the loop to look, beside one that is under way."""
    handed = client._client._joiner._handed  # pyright: ignore[reportPrivateUsage]
    return bool(client._under_way) and len(handed) == count  # pyright: ignore[reportPrivateUsage]


async def in_threads(
    client: Client, count: int, **options: Any
) -> tuple[list[asyncio.Future[Prediction]], ThreadPoolExecutor]:
    """Makes calls in threads of their own, all of which wait when the client's loop looks; the first goes alone."""
    await asyncio.to_thread(client.predict, "m", x(0))
    pool = ThreadPoolExecutor(count)
    go_on = threading.Event()
    client._loop.call_soon(go_on.wait)  # pyright: ignore[reportPrivateUsage]

    def call(number: int) -> Prediction:
        return client.predict("m", x(number), **options)

    calls: list[asyncio.Future[Prediction]] = []
    for number in range(count):
        calls.append(asyncio.get_running_loop().run_in_executor(pool, call, number))
        await asyncio.to_thread(wait_for, partial(has_handed_over, client, number), "a thread's call")
    go_on.set()
    return calls, pool


async def ended(calls: list[asyncio.Future[Prediction]], pool: ThreadPoolExecutor) -> list[Prediction | BaseException]:
    """Returns how calls in threads ended."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    pool.shutdown()
    return outcomes


async def test_threads_of_one_blocking_client_share_messages() -> None:
    async with FakeServer() as server:
        with Client(server.address) as client:
            outcomes = await ended(*await in_threads(client, 12))
            assert await asyncio.to_thread(client.predict, "m", x(1))
    assert answers(outcomes) == [2 * number for number in range(12)]
    assert server.messages == [11]


async def test_threads_meet_as_they_come() -> None:
    everybody = asyncio.Event()

    async def gather_all(request: Request) -> None:
        if len(server.requests) >= 12:
            everybody.set()
        await everybody.wait()

    async with FakeServer(on_request=gather_all) as server:
        with Client(server.address) as client, ThreadPoolExecutor(12) as pool:

            def call(number: int) -> float:
                return float(client.predict("m", x(number))["y"][0])

            loop = asyncio.get_running_loop()
            found = await asyncio.gather(*[loop.run_in_executor(pool, call, number) for number in range(12)])
        assert found == [2 * number for number in range(12)]
        assert len(server.requests) == 12


@pytest.mark.parametrize("pushback_ms", [None, 1])
@pytest.mark.parametrize("code", FAILING)
async def test_an_error_of_a_thread_is_the_one_that_it_gets_by_itself(
    code: grpc.StatusCode, pushback_ms: int | None
) -> None:
    async def refuse_odd_ones(request: Request) -> None:
        if number_of(request) % 2:
            raise RefusalError(code, "because", retry_after_ms=pushback_ms)

    async with FakeServer(on_request=refuse_odd_ones) as server:
        with Client(server.address, retry=QUICK) as client:
            outcomes = await ended(*await in_threads(client, 6))
            asking = asyncio.to_thread(client.predict, "m", x(1))
            (alone,) = await asyncio.gather(asking, return_exceptions=True)
    assert server.messages == [5]
    assert answers(outcomes[::2]) == [0, 4, 8]
    assert [raised(outcome) for outcome in outcomes[1::2]] == [raised(alone)] * 3


async def test_what_may_pass_is_tried_again_for_threads() -> None:
    refused: dict[int, int] = {}

    async def refuse_twice(request: Request) -> None:
        number = number_of(request)
        refused[number] = refused.get(number, 0) + 1
        if number % 3 == 2 and refused[number] < 3:
            code = grpc.StatusCode.UNAVAILABLE if number == 2 else grpc.StatusCode.RESOURCE_EXHAUSTED
            raise RefusalError(code, retry_after_ms=20)

    async with FakeServer(on_request=refuse_twice) as server:
        with Client(server.address, retry=QUICK) as client:
            outcomes = await ended(*await in_threads(client, 9))
    assert answers(outcomes) == [2 * number for number in range(9)]
    assert refused == {0: 2} | {number: 3 if number % 3 == 2 else 1 for number in range(1, 9)}


async def test_a_server_without_the_call_is_asked_once_for_all_threads() -> None:
    async with FakeServer(knows_many=False) as server:
        with Client(server.address) as client:
            for _ in range(2):
                found = await asyncio.gather(*[asyncio.to_thread(client.predict, "m", x(1)) for _ in range(3)])
                assert answers([*found]) == [2] * 3
            first = len(server.messages)
            assert first <= 1
            client._client._joiner._is_known = True  # pyright: ignore[reportPrivateUsage]
            outcomes = await ended(*await in_threads(client, 6))
    assert answers(outcomes) == [2 * number for number in range(6)]
    assert server.messages[first:] == [5]


async def test_each_thread_has_its_own_deadline() -> None:
    async def hang(request: Request) -> None:
        if number_of(request) % 2:
            await asyncio.Event().wait()

    async with FakeServer(on_request=hang) as server:
        with Client(server.address) as client:
            outcomes = await ended(*await in_threads(client, 6, timeout_s=0.3))
    assert [type(outcome) for outcome in outcomes] == [Prediction, DeadlineExceededError] * 3


async def test_closing_the_client_ends_the_calls_of_threads() -> None:
    async def hang(request: Request) -> None:
        if number_of(request):
            await asyncio.Event().wait()

    async with FakeServer(on_request=hang) as server:
        client = Client(server.address)
        calls, pool = await in_threads(client, 6)
        await server.seen(7)
        await asyncio.to_thread(client.close)
        outcomes = await ended(calls, pool)
    assert [type(outcome) for outcome in outcomes] == [Prediction, *[ClientClosedError] * 5]


async def test_threads_whose_calls_the_loop_has_not_seen_are_told_of_a_close() -> None:
    async with FakeServer() as server:
        client = Client(server.address)
        await asyncio.to_thread(client.predict, "m", x(0))
        go_on = threading.Event()
        loop, joiner = client._loop, client._client._joiner  # pyright: ignore[reportPrivateUsage]
        loop.call_soon(go_on.wait)
        joiner._is_woken = True  # pyright: ignore[reportPrivateUsage] - as if the loop were about to look
        client._under_way.add("another")  # pyright: ignore[reportPrivateUsage]
        call = asyncio.create_task(asyncio.to_thread(client.predict, "m", x(1)))
        await asyncio.to_thread(wait_for, partial(has_handed_over, client, 1), "the thread's call")
        closing = asyncio.create_task(asyncio.to_thread(client.close))
        go_on.set()
        with pytest.raises(ClientClosedError):
            await call
        await closing
        with pytest.raises(ClientClosedError):
            await asyncio.to_thread(client.predict, "m", x(1))


async def test_threads_with_lists_find_out_that_the_model_has_changed() -> None:
    async with FakeServer() as server:
        with Client(server.address) as client:
            await asyncio.to_thread(client.predict, "m", [1])
            server.sign = signature([spec("z", "int32", -1)], [spec("y", "int32", -1)])
            server.run = lambda inputs, version: {"y": inputs["z"]}

            async def refuse_x(request: Request) -> None:
                if request.inputs[0].name == "x":
                    raise RefusalError(grpc.StatusCode.INVALID_ARGUMENT, "there is no input 'x'")

            server.on_request = refuse_x
            client._under_way.add("another")  # pyright: ignore[reportPrivateUsage]
            answer = await asyncio.to_thread(client.predict, "m", [1])
            assert answer["y"].dtype == np.int32
            with pytest.raises(InvalidArgumentError, match="no input 'x'"):
                await asyncio.to_thread(client.predict, "m", x(1))


class Silent:
    """A stream that never answers."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()

    def __call__(self, request: bytes, timeout: float | None = None) -> Silent:
        return self

    async def __aiter__(self) -> AsyncIterator[Any]:
        self.begun.set()
        await asyncio.Event().wait()
        yield None

    def cancel(self) -> bool:
        self.cancelled.set()
        return True


async def never(*_: Any) -> Any:
    await asyncio.Event().wait()


def test_an_interrupt_gives_a_threads_call_up() -> None:
    loop, silent = LoopThread("test"), Silent()
    joiner = Joiner("here:1", 1 << 20, may_retry=True, finish=never, on_answer=lambda: None)
    deadline = time.monotonic() + 60

    def interrupt() -> None:
        silent.begun.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    go_on = threading.Event()
    loop.call_soon(go_on.wait)
    pool = ThreadPoolExecutor(2)
    other = pool.submit(joiner.hand_over, silent, Request(), deadline, loop.call_soon)
    pool.submit(interrupt)
    wait_for(lambda: bool(joiner._handed), "the other call")  # pyright: ignore[reportPrivateUsage]
    threading.Timer(0.05, go_on.set).start()
    with pytest.raises(KeyboardInterrupt):
        joiner.hand_over(silent, Request(), deadline, loop.call_soon)
    loop.close(joiner.close)
    assert isinstance(other.exception(20), ClientClosedError)
    assert silent.cancelled.is_set()
    pool.shutdown()
