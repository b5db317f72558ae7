"""The blocking client's thread: closed under its callers, and used from within itself."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections.abc import Callable, Coroutine, Generator
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


async def test_an_iterator_takes_what_it_has_room_for_and_no_more() -> None:
    taken = 0

    def numbers() -> Generator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    source = ThreadedIterator(numbers(), 2)
    assert [await anext(source), await anext(source)] == [1, 2]
    third = asyncio.ensure_future(anext(source))
    await asyncio.wait({third}, timeout=0.1)
    assert not third.done()
    assert taken == 2
    source.make_room(2)
    assert [await third, await anext(source)] == [3, 4]
    source.close()
    assert taken == 4


async def test_an_iterator_gives_what_came_before_an_error_first_and_goes_on_to_raise_it() -> None:
    def failing() -> Generator[int]:
        yield 1
        yield 2
        raise LookupError("my own")

    source = ThreadedIterator(failing(), 9)
    assert [await anext(source), await anext(source)] == [1, 2]
    for _ in range(2):
        with pytest.raises(LookupError, match="my own"):
            await anext(source)
    source.close()


async def test_an_iterator_that_is_closed_while_it_waits_for_room_has_no_thread() -> None:
    source = ThreadedIterator(iter(range(9)), 1)
    assert await anext(source) == 0
    await asyncio.to_thread(source.close)
    assert "modelport-batches" not in [thread.name for thread in threading.enumerate()]


def steps(*outcomes: list[int] | Exception | threading.Event) -> Callable[[], Coroutine[Any, Any, list[int]]]:
    """Returns what gives one outcome after the other; it waits for ever in place of an event, which it then sets."""
    left = iter(outcomes)

    async def step() -> list[int]:
        outcome = next(left)
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, threading.Event):
            try:
                await asyncio.Event().wait()
            finally:
                outcome.set()
            return []
        return outcome

    return step


def test_what_runs_ahead_ends_with_nothing_or_with_an_error_after_all_else() -> None:
    thread = LoopThread("test")
    assert list(thread.run_ahead(steps([1, 2], [3], []))) == [[1, 2], [3]]
    made = thread.run_ahead(steps([1], [2], LookupError("my own")))
    assert [next(made), next(made)] == [[1], [2]]
    with pytest.raises(LookupError, match="my own"):
        next(made)
    thread.close(nothing)


def test_what_runs_ahead_is_cancelled_by_closing_it() -> None:
    thread = LoopThread("test")
    cancelled = threading.Event()
    made = thread.run_ahead(steps([1], cancelled))
    assert next(made) == [1]
    made.close()
    assert cancelled.wait(_PATIENCE_S)
    thread.close(nothing)


def test_what_runs_ahead_is_cancelled_by_an_interrupt() -> None:
    thread = LoopThread("test")
    cancelled = threading.Event()
    made = thread.run_ahead(steps([1], cancelled))
    assert next(made) == [1]
    main = threading.get_ident()
    interrupter = threading.Thread(target=lambda: signal.pthread_kill(main, signal.SIGINT))

    def wait_interrupted() -> None:
        interrupter.start()
        next(made)

    with pytest.raises(KeyboardInterrupt):
        wait_interrupted()
    made.close()  # does nothing, unless the interrupt came before it waited
    assert cancelled.wait(_PATIENCE_S)
    interrupter.join()
    thread.close(nothing)


def test_who_waits_for_what_runs_ahead_is_told_of_a_close() -> None:
    thread = LoopThread("test")
    made = thread.run_ahead(steps([1], threading.Event()))
    assert next(made) == [1]
    waiting = in_thread(lambda: next(made))
    thread.close(nothing)
    with pytest.raises(ClientClosedError, match="closed during the call"):
        waiting.result(_PATIENCE_S)
