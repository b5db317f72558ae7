"""Streams of batches against a real gRPC server: order, windows, resuming, retiring, errors."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from modelport import (
    AsyncClient,
    Client,
    ClientClosedError,
    InputError,
    InvalidArgumentError,
    NotFoundError,
    RetryPolicy,
    StreamInterruptedError,
    StreamResult,
    UnauthenticatedError,
    UnavailableError,
    VersionRetiredError,
)
from tests.support.fake_server import FakeServer, RefusalError, Request, doubled

QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.05)


def batch(number: int) -> dict[str, Any]:
    return {"x": np.array([number], np.float32)}


def batches(count: int, start: int = 0) -> Iterator[dict[str, Any]]:
    return (batch(number) for number in range(start, start + count))


def check(results: list[StreamResult], count: int) -> None:
    assert [result.index for result in results] == list(range(count))
    assert [float(result.prediction["y"][0]) for result in results] == [2.0 * n for n in range(count)]


async def collected(stream: AsyncIterator[StreamResult]) -> list[StreamResult]:
    return [result async for result in stream]


async def until_error(stream: AsyncIterator[StreamResult]) -> tuple[list[StreamResult], Exception | None]:
    results: list[StreamResult] = []
    try:
        async for result in stream:
            results.append(result)  # noqa: PERF401 - kept though it raises
    except Exception as error:
        return results, error
    return results, None


async def test_results_come_in_order() -> None:
    async with FakeServer() as server, AsyncClient(server.address) as client:
        check(await collected(client.predict_stream("m", batches(100))), 100)
    assert server.streams == 1
    assert [r.sequence for r in server.requests] == list(range(1, 101))


async def test_any_iterable_will_do() -> None:
    async def numbers() -> AsyncIterator[list[int]]:
        for number in range(5):
            yield [number]

    async with FakeServer() as server, AsyncClient(server.address) as client:
        check(await collected(client.predict_stream("m", numbers())), 5)
        check(await collected(client.predict_stream("m", [[n] for n in range(5)])), 5)
        check(await collected(client.predict_stream("m", np.arange(5, dtype=np.float32)[:, None])), 5)  # pyright: ignore[reportArgumentType]
        assert await collected(client.predict_stream("m", [])) == []


async def test_no_more_than_the_window_is_taken_ahead_of_the_answers() -> None:
    pulled = 0

    async def endless() -> AsyncIterator[dict[str, Any]]:
        nonlocal pulled
        while True:
            pulled += 1
            yield batch(pulled)

    async with FakeServer() as server, AsyncClient(server.address) as client:
        stream = client.predict_stream("m", endless(), window=5)
        for taken in range(1, 200):
            await anext(stream)
            assert pulled <= taken + 5
        await stream.aclose()


async def test_a_server_that_answers_nothing_is_sent_no_more_than_the_window() -> None:
    async def hang_after_first(request: Request) -> None:
        if request.sequence > 1:
            await asyncio.Event().wait()

    async with FakeServer(on_request=hang_after_first) as server, AsyncClient(server.address) as client:
        taken: list[int] = []

        def counted() -> Iterator[dict[str, Any]]:
            for number in range(100):
                taken.append(number)
                yield batch(number)

        stream = client.predict_stream("m", counted(), window=4)
        await anext(stream)
        waiting = asyncio.create_task(anext(stream))
        await server.seen(2)
        assert len(taken) <= 5
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await stream.aclose()


async def test_closing_early_ends_the_call_and_every_task() -> None:
    async with FakeServer() as server, AsyncClient(server.address) as client:
        before = asyncio.all_tasks()
        async with contextlib.aclosing(client.predict_stream("m", batches(1000))) as stream:
            async for result in stream:
                if result.index == 3:
                    break
        await server.streams_ended()
        await asyncio.sleep(0)
        assert {t for t in asyncio.all_tasks() - before if "modelport" in repr(t.get_coro())} == set()


async def test_what_the_iterable_raises_comes_after_the_answers_before_it() -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield from batches(3)
        raise LookupError("my own")

    async with FakeServer() as server, AsyncClient(server.address) as client:
        results, error = await until_error(client.predict_stream("m", failing()))
        assert isinstance(error, LookupError)
        assert "my own" in str(error)
    check(results, 3)


async def test_a_bad_batch_is_raised_in_its_turn() -> None:
    async def refuse(request: Request) -> None:
        if request.sequence == 4:
            raise RefusalError(grpc.StatusCode.INVALID_ARGUMENT, "bad batch")

    async with FakeServer(on_request=refuse) as server, AsyncClient(server.address) as client:
        results, error = await until_error(client.predict_stream("m", batches(9)))
        assert isinstance(error, InvalidArgumentError)
        assert "bad batch" in str(error)
    check(results, 3)


async def test_a_bad_batch_may_be_returned_and_the_stream_goes_on() -> None:
    async def refuse(request: Request) -> None:
        if request.sequence == 4:
            raise RefusalError(grpc.StatusCode.INVALID_ARGUMENT, "bad batch")

    mixed: list[Any] = [*batches(7), {"x": np.zeros(1, complex)}, {"x": ["text"]}, *batches(1)]
    async with FakeServer(on_request=refuse) as server, AsyncClient(server.address) as client:
        results = await collected(client.predict_stream("m", mixed, on_error="return"))
    assert [r.index for r in results] == list(range(10))
    assert [r.index for r in results if r.error] == [3, 7, 8]
    assert isinstance(results[3].error, InvalidArgumentError)
    assert isinstance(results[7].error, InputError)
    with pytest.raises(InputError, match="takes float32, and the list holds 'str'"):
        _ = results[8].prediction


async def test_a_batch_over_the_limit_is_that_batch_s_error() -> None:
    mixed = [batch(0), {"x": np.zeros(50000, np.float32)}, batch(2)]
    async with FakeServer() as server, AsyncClient(server.address, max_message_bytes=1 << 16) as client:
        results = await collected(client.predict_stream("m", mixed, on_error="return"))
    assert [r.error is None for r in results] == [True, False, True]


@pytest.mark.parametrize(
    "refusal",
    [
        RefusalError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_ms=5),
        RefusalError(grpc.StatusCode.UNAVAILABLE, "engine died"),
    ],
)
async def test_what_passes_is_tried_again_and_order_is_kept(refusal: RefusalError) -> None:
    refused: set[int] = set()

    async def refuse_once(request: Request) -> None:
        if request.sequence % 7 == 3 and request.sequence not in refused:
            refused.add(request.sequence)
            raise refusal

    async with FakeServer(on_request=refuse_once) as server, AsyncClient(server.address, retry=QUICK) as client:
        check(await collected(client.predict_stream("m", batches(60))), 60)
    assert server.streams == 1
    assert len(refused) == 9
    assert len(server.requests) == 69


async def test_a_stream_stays_on_its_version_and_one_that_follows_does_not() -> None:
    async def publish(request: Request) -> None:
        if request.sequence == 10:
            server.publish(2)

    for follow, expected in ((False, {1}), (True, {1, 2})):
        server = FakeServer(on_request=publish)
        async with server, AsyncClient(server.address) as client:
            results = await collected(client.predict_stream("m", batches(30), follow=follow))
        check(results, 30)
        assert {r.prediction.version for r in results} == expected


async def test_a_killed_server_that_comes_back_is_resumed_on_the_same_version() -> None:
    server = FakeServer(versions={1, 2})
    killers: list[asyncio.Task[None]] = []

    async def restart() -> None:
        await server.kill()
        server.publish(2)
        await server.start()

    async def kill_at_20(request: Request) -> None:
        if request.sequence == 20 and not killers:
            killers.append(asyncio.create_task(restart()))
            await asyncio.Event().wait()

    server.on_request = kill_at_20
    async with server, AsyncClient(server.address, retry=QUICK) as client:
        results = await collected(client.predict_stream("m", batches(50)))
        await killers[0]
    check(results, 50)
    assert server.streams == 2
    assert {r.prediction.version for r in results} == {1}


async def test_a_version_that_is_gone_after_a_restart_is_left_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = FakeServer()
    killers: list[asyncio.Task[None]] = []

    async def restart() -> None:
        await server.kill()
        server.versions, server.serving = {2}, 2
        await server.start()

    async def kill_at_20(request: Request) -> None:
        if request.sequence == 20 and not killers:
            killers.append(asyncio.create_task(restart()))
            await asyncio.Event().wait()

    server.on_request = kill_at_20
    async with server, AsyncClient(server.address, retry=QUICK) as client:
        results = await collected(client.predict_stream("m", batches(50)))
        check(results, 50)
        assert [r.prediction.version for r in results] == [1] * 19 + [2] * 31
        assert "version 1 of m is gone" in caplog.text
        with pytest.raises(NotFoundError):
            await collected(client.predict_stream("m", batches(5), version=1))


@pytest.mark.parametrize("follow", [False, True])
async def test_a_draining_server_loses_nothing_and_computes_nothing_twice(follow: bool) -> None:
    server = FakeServer()

    async def drain(request: Request) -> None:
        if request.sequence in (10, 25):
            server.drain()

    server.on_request = drain
    async with server, AsyncClient(server.address) as client:
        results = await collected(client.predict_stream("m", batches(40), follow=follow))
    check(results, 40)
    assert server.streams == 3
    assert len(server.requests) == 40


async def test_a_retired_version_is_followed_by_the_one_in_charge() -> None:
    server = FakeServer()

    async def retire(request: Request) -> None:
        if request.sequence == 10 and 1 in server.versions:
            server.retire(1, successor=2)
            await asyncio.Event().wait()

    server.on_request = retire
    async with server, AsyncClient(server.address) as client:
        results = await collected(client.predict_stream("m", batches(30)))
    check(results, 30)
    assert [r.prediction.version for r in results] == [1] * 9 + [2] * 21


async def test_a_retired_version_that_was_asked_for_by_number_is_an_error() -> None:
    server = FakeServer()

    async def retire(request: Request) -> None:
        if request.sequence == 10:
            server.retire(1, successor=2)
            await asyncio.Event().wait()

    server.on_request = retire
    async with server, AsyncClient(server.address) as client:
        results, error = await until_error(client.predict_stream("m", batches(30), version=1))
        assert isinstance(error, VersionRetiredError)
        assert "version 1 of m is not served any more" in str(error)
    check(results, 9)


async def test_a_stream_that_can_not_be_resumed_says_what_was_answered() -> None:
    server = FakeServer()
    killers: list[asyncio.Task[None]] = []

    async def die_at_10(request: Request) -> None:
        if request.sequence == 10:
            killers.append(asyncio.create_task(server.kill()))
            await asyncio.Event().wait()

    server.on_request = die_at_10
    async with server, AsyncClient(server.address, retry=QUICK) as client:
        results, error = await until_error(client.predict_stream("m", batches(30), window=4, resume_timeout_s=0.3))
        assert isinstance(error, StreamInterruptedError)
        assert "9 batches were answered" in str(error)
    check(results, 9)
    assert error.answered == 9
    assert error.unanswered == (9, 10, 11, 12)
    assert isinstance(error.__cause__, UnavailableError)


async def test_a_server_that_was_never_there_is_said_soon() -> None:
    async with FakeServer() as server:
        address = server.address
    async with AsyncClient(address, retry=QUICK) as client:
        with pytest.raises(UnavailableError, match="no server answers"):
            await collected(client.predict_stream("m", batches(3)))


async def test_a_refused_stream_raises_what_the_server_said() -> None:
    async def refuse(context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")

    async with FakeServer(on_open=refuse) as server, AsyncClient(server.address, retry=QUICK) as client:
        with pytest.raises(UnauthenticatedError, match="no token"):
            await collected(client.predict_stream("m", batches(30)))


async def test_a_server_that_keeps_closing_streams_is_not_asked_for_ever() -> None:
    async def end(context: Any) -> None:
        await context.abort(grpc.StatusCode.INTERNAL, "bug 7")

    async with FakeServer(on_open=end) as server, AsyncClient(server.address, retry=QUICK) as client:
        with pytest.raises(Exception, match=r"bug 7|was closed without an answer"):
            await collected(client.predict_stream("m", batches(3), resume_timeout_s=2))
    assert 1 < server.streams < 200


async def test_an_idle_stream_whose_connection_breaks_goes_on_with_the_next_batch() -> None:
    server = FakeServer()
    more = asyncio.Event()

    async def slow() -> AsyncIterator[dict[str, Any]]:
        yield batch(0)
        await more.wait()
        yield batch(1)

    async with server, AsyncClient(server.address, retry=QUICK) as client:
        stream = client.predict_stream("m", slow(), resume_timeout_s=1)
        await anext(stream)
        await server.kill()
        await server.start()
        more.set()
        assert (await anext(stream)).index == 1
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_closing_the_client_ends_its_streams() -> None:
    async def hang(request: Request) -> None:
        await asyncio.Event().wait()

    async with FakeServer(on_request=hang) as server:
        client = AsyncClient(server.address)
        waiting = asyncio.create_task(collected(client.predict_stream("m", batches(3))))
        await server.seen(1)
        await client.close()
        with pytest.raises(ClientClosedError):
            await waiting


async def in_thread(work: Any, *arguments: Any) -> Any:
    return await asyncio.to_thread(work, *arguments)


async def test_the_blocking_client_does_it_all() -> None:
    server = FakeServer(versions={1, 2})

    def work() -> None:
        with Client(server.address) as client:
            client.wait_ready(timeout_s=5)
            assert client.is_ready()
            assert client.predict("m", [1, 2])["y"].tolist() == [2, 4]
            assert client.model("m") == client.models()[0]
            assert next(iter(client.watch())).model.name == "m"
            check(list(client.predict_stream("m", batches(300))), 300)
            big = Client(server.address, max_message_bytes=1 << 16)
            with big:
                assert len(big.predict("m", np.zeros(50000, np.float32))["y"]) == 50000
        with pytest.raises(ClientClosedError):
            client.predict("m", [1])
        client.close()

    async with server:
        await in_thread(work)


async def test_the_blocking_client_s_window_is_bounded_and_closing_early_leaves_no_thread() -> None:
    def work(address: str) -> None:
        before = set(threading.enumerate())
        pulled = 0

        def endless() -> Iterator[dict[str, Any]]:
            nonlocal pulled
            while True:
                pulled += 1
                yield batch(pulled)

        with Client(address) as client:
            for taken, _ in enumerate(client.predict_stream("m", endless(), window=6), start=1):
                assert pulled <= taken + 6 + 4
                if taken == 100:
                    break
        ours = [t for t in set(threading.enumerate()) - before if t.name.startswith("modelport")]
        assert ours == []

    async with FakeServer() as server:
        await in_thread(work, server.address)
        await server.streams_ended()


async def test_a_slow_iterable_does_not_hold_back_answers() -> None:
    def work(address: str) -> None:
        answered = threading.Event()

        def waits_for_its_answer() -> Iterator[dict[str, Any]]:
            for number in range(5):
                yield batch(number)
                assert answered.wait(30)
                answered.clear()

        with Client(address) as client:
            for _ in client.predict_stream("m", waits_for_its_answer()):
                answered.set()

    async with FakeServer() as server:
        await in_thread(work, server.address)


async def test_an_iterable_that_blocks_holds_back_no_answer_to_the_batches_before() -> None:
    def work(address: str) -> None:
        answered = threading.Event()

        def blocks_in_the_middle() -> Iterator[dict[str, Any]]:
            yield from batches(5)
            assert answered.wait(30)
            yield from batches(5, start=5)

        with Client(address) as client:
            results: list[StreamResult] = []
            for result in client.predict_stream("m", blocks_in_the_middle()):
                results.append(result)
                if len(results) == 5:
                    answered.set()
        check(results, 10)

    async with FakeServer() as server:
        await in_thread(work, server.address)


async def test_an_iterable_that_blocks_does_not_keep_a_stream_from_being_left() -> None:
    def work(address: str) -> None:
        left = threading.Event()

        def blocks() -> Iterator[dict[str, Any]]:
            yield batch(0)
            left.wait(30)

        with Client(address) as client:
            stream = client.predict_stream("m", blocks())
            next(stream)
            stream.close()
            assert not left.is_set()
            left.set()

    async with FakeServer() as server:
        await in_thread(work, server.address)
        await server.streams_ended()


async def test_a_blocking_stream_that_can_not_be_resumed_gives_what_was_answered_first() -> None:
    killers: list[asyncio.Task[None]] = []

    async def die_at_10(request: Request) -> None:
        if request.sequence == 10:
            killers.append(asyncio.create_task(server.kill()))
            await asyncio.Event().wait()

    def work(address: str) -> None:
        results: list[StreamResult] = []
        with Client(address, retry=QUICK) as client:
            stream = client.predict_stream("m", batches(30), window=4, resume_timeout_s=0.3)
            with pytest.raises(StreamInterruptedError) as caught:
                results.extend(stream)
        check(results, 9)
        assert caught.value.answered == 9
        assert caught.value.unanswered == (9, 10, 11, 12)

    server = FakeServer(on_request=die_at_10)
    async with server:
        await in_thread(work, server.address)


async def test_who_waits_for_a_blocking_stream_is_told_that_its_client_was_closed() -> None:
    async def hang(request: Request) -> None:
        if request.sequence == 2:
            await asyncio.Event().wait()

    async with FakeServer(on_request=hang) as server:
        client = Client(server.address)
        stream = client.predict_stream("m", batches(9))
        assert (await in_thread(next, stream)).index == 0
        waiting = asyncio.create_task(in_thread(list, stream))
        await server.seen(2)
        await in_thread(client.close)
        with pytest.raises(ClientClosedError):
            await waiting


async def test_what_a_blocking_iterable_raises_reaches_the_caller() -> None:
    def work(address: str) -> None:
        def failing() -> Iterator[dict[str, Any]]:
            yield from batches(3)
            raise LookupError("my own")

        class NotIterable:
            def __iter__(self) -> Iterator[dict[str, Any]]:
                raise TypeError("not today")

        with Client(address) as client:
            results: list[StreamResult] = []
            with pytest.raises(LookupError, match="my own"):
                results.extend(client.predict_stream("m", failing()))
            check(results, 3)
            with pytest.raises(TypeError, match="not today"):
                list(client.predict_stream("m", NotIterable()))
            assert client.predict("m", [1]).version == 1

    async with FakeServer() as server:
        await in_thread(work, server.address)


async def test_many_threads_share_one_client() -> None:
    def work(address: str) -> None:
        errors: list[BaseException] = []
        with Client(address) as client:

            def calls(seed: int) -> None:
                try:
                    for number in range(20):
                        assert client.predict("m", batch(seed * number))["y"][0] == 2 * seed * number
                    check(list(client.predict_stream("m", batches(20))), 20)
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=calls, args=(n,)) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert errors == []

    async with FakeServer(run=doubled) as server:
        await in_thread(work, server.address)


async def test_a_server_that_falls_silent_counts_as_broken() -> None:
    async def hang_once(request: Request) -> None:
        if request.sequence == 10 and server.streams == 1:
            await asyncio.Event().wait()

    async with FakeServer(on_request=hang_once) as server, AsyncClient(server.address, retry=QUICK) as client:
        check(await collected(client.predict_stream("m", batches(30), timeout_s=0.2)), 30)
    assert server.streams == 2


async def test_a_server_that_takes_its_time_for_each_answer_is_not_silent() -> None:
    async def slow(request: Request) -> None:
        await asyncio.sleep(0.1)

    async with FakeServer(on_request=slow) as server, AsyncClient(server.address) as client:
        check(await collected(client.predict_stream("m", batches(10), timeout_s=0.6)), 10)
    assert server.streams == 1


async def test_a_server_that_stays_silent_interrupts_the_stream() -> None:
    async def hang(request: Request) -> None:
        if request.sequence == 10:
            await asyncio.Event().wait()

    async with FakeServer(on_request=hang) as server, AsyncClient(server.address, retry=QUICK) as client:
        stream = client.predict_stream("m", batches(30), timeout_s=0.2, resume_timeout_s=0.3)
        results, error = await until_error(stream)
    check(results, 9)
    assert isinstance(error, StreamInterruptedError)
    assert "no answer came for 0.2 s" in str(error)


async def test_waiting_for_batches_is_not_falling_silent() -> None:
    more = asyncio.Event()

    async def slow() -> AsyncIterator[dict[str, Any]]:
        yield batch(0)
        await more.wait()
        yield batch(1)

    async with FakeServer() as server, AsyncClient(server.address) as client:
        stream = client.predict_stream("m", slow(), timeout_s=0.05)
        await anext(stream)
        asyncio.get_running_loop().call_later(0.2, more.set)
        await anext(stream)
        await stream.aclose()
    assert server.streams == 1
