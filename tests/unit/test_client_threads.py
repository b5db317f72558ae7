"""The blocking client's thread: closed under its callers, and used from within itself."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from modelport import ClientClosedError
from modelport._threads import LoopThread, ThreadedIterator

_PATIENCE_S = 10.0


def in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Runs ``function`` in a thread that can't hold up the tests, should it hang."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


async def nothing() -> None:
    pass


async def one() -> int:
    return 1


async def running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_a_call_that_meets_a_close_is_made_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = LoopThread("test")
    loop = thread.run(running_loop())
    submit: Callable[..., Any] = loop.call_soon_threadsafe
    closings: list[threading.Thread] = []

    def close_first(*arguments: Any, **options: Any) -> Any:
        if not closings:
            closings.append(threading.Thread(target=thread.close, args=(nothing,)))
            closings[0].start()
            closings[0].join(0.2)  # ends only if nothing keeps it from closing in between
        return submit(*arguments, **options)

    monkeypatch.setattr(loop, "call_soon_threadsafe", close_first)
    assert in_thread(lambda: thread.run(one())).result(_PATIENCE_S) == 1
    closings[0].join()
    with pytest.raises(ClientClosedError):
        thread.run(one())


def test_a_call_that_a_close_ends_says_so() -> None:
    thread = LoopThread("test")
    begun = threading.Event()

    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    call = in_thread(lambda: thread.run(wait()))
    assert begun.wait(_PATIENCE_S)
    thread.close(nothing)
    with pytest.raises(ClientClosedError, match="closed during the call"):
        call.result(_PATIENCE_S)


def test_a_call_that_cancels_itself_is_not_taken_for_a_close() -> None:
    thread = LoopThread("test")

    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(CancelledError):
        thread.run(cancelled())
    thread.close(nothing)


def test_a_generator_may_be_finalised_in_the_loop_s_thread() -> None:
    thread = LoopThread("test")
    tidied = threading.Event()

    async def tidy() -> None:
        tidied.set()

    def generator() -> Generator[int]:
        try:
            yield 1
        finally:
            thread.try_run(tidy())

    cycle: list[Any] = [generator()]
    cycle.append(cycle)
    next(cycle[0])
    del cycle

    async def collect() -> None:
        gc.collect()

    in_thread(lambda: thread.run(collect())).result(_PATIENCE_S)
    assert tidied.wait(_PATIENCE_S)
    thread.close(nothing)


def test_the_loop_s_thread_may_close_it_and_can_not_wait_for_itself() -> None:
    thread = LoopThread("test")
    loops: list[asyncio.AbstractEventLoop] = []

    async def misuse() -> None:
        loops.append(asyncio.get_running_loop())
        with pytest.raises(RuntimeError, match="wait for itself"):
            thread.run(one())
        thread.close(nothing)

    in_thread(lambda: thread.run(misuse())).result(_PATIENCE_S)
    owner = next((t for t in threading.enumerate() if t.name == "test"), None)
    if owner is not None:
        owner.join(_PATIENCE_S)
    assert loops[0].is_closed()


async def test_an_iterator_may_be_closed_in_its_own_thread() -> None:
    closed = threading.Event()

    def batches() -> Generator[int]:
        yield 1
        source.close()
        closed.set()
        yield 2

    source = ThreadedIterator(batches(), 2)
    assert await anext(source) == 1
    assert await anext(source) == 2
    assert closed.is_set()
