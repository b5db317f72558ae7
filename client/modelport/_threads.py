"""Lets blocking code use the asynchronous client: a thread for the loop, a thread for an iterable."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterable
from concurrent.futures import CancelledError, Future
from typing import Any, Generic, TypeVar, cast

from modelport.exceptions import ClientClosedError

T = TypeVar("T")
_JOIN_TIMEOUT_S = 1.0


class LoopThread:
    """An event loop in a thread of its own, which starts with the first use."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.RLock()  # a garbage collection may come in here again while it is held
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs ``coroutine`` in the loop and returns or raises what it does.

        An interrupt cancels it, and is raised once it has ended.

        Raises:
            ClientClosedError: if the loop was closed, before or meanwhile.
            RuntimeError: if called in the loop's own thread.
        """
        if self.is_here:
            coroutine.close()
            raise RuntimeError("a blocking call in the client's own thread would wait for itself")
        outcome, cancel = self._begun(coroutine)
        try:
            return self._result(outcome)
        finally:
            if not outcome.done():
                cancel()
                concurrent.futures.wait([outcome])

    def try_run(self, coroutine: Coroutine[Any, Any, T]) -> None:
        """Runs ``coroutine`` in the loop, or not at all if that is closed.

        Does not wait for it in the loop's own thread, where the garbage collector may end a generator.
        """
        with contextlib.suppress(ClientClosedError):
            if self.is_here:
                self._begun(coroutine)
            else:
                self.run(coroutine)

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Has ``callback`` called in the loop.

        Raises:
            ClientClosedError: if the loop is closed.
        """
        with self._lock:
            self._started().call_soon_threadsafe(callback)

    def run_ahead(self, step: Callable[[], Coroutine[Any, Any, list[T]]]) -> Generator[list[T], None, None]:
        """Yields what ``step`` returns, called again and again in the loop until that is empty.

        It is called without waiting for the one who takes, who so has to ask for nothing, only to wait: ``step``
        itself sees to it that there is never too much.

        Raises:
            ClientClosedError: if the loop was closed, before or meanwhile.
            Exception: whatever ``step`` raised, after all that it returned before.
        """
        made: queue.SimpleQueue[list[T]] = queue.SimpleQueue()

        async def make() -> None:
            while some := await step():
                made.put(some)

        outcome, cancel = self._begun(make())
        outcome.add_done_callback(lambda _: made.put([]))
        try:
            while some := made.get():
                yield some
            self._result(outcome)
        finally:
            if not outcome.done():
                cancel()  # and does not wait for it, since it may be the loop's thread that collects this

    def iterate(self, items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """Yields what ``items`` does, which runs in the loop and is closed with this generator."""
        running: list[asyncio.Task[Any]] = []
        try:
            while (item := self.run(_next_or_end(items, running))) is not _END:
                yield cast("T", item)
        finally:
            self.try_run(_close(items, running))

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs ``last`` in the loop if there is one, stops it and waits for its thread, if that is another one."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            loop, thread = self._loop, self._thread
        if was_closed or loop is None or thread is None:
            return
        future = asyncio.run_coroutine_threadsafe(last(), loop)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
        if self.is_here:
            return
        try:
            future.result()
        finally:
            future.cancel()  # does nothing, unless the wait was interrupted
            thread.join()

    @property
    def is_here(self) -> bool:
        """Whether this is the loop's own thread."""
        return threading.current_thread() is self._thread

    def _result(self, outcome: Future[T]) -> T:
        try:
            return outcome.result()
        except CancelledError as error:
            if self._is_closed:
                raise ClientClosedError("the client was closed during the call") from error
            raise

    def _begun(self, coroutine: Coroutine[Any, Any, T]) -> tuple[Future[T], Callable[[], None]]:
        """Returns what will have come of ``coroutine`` once it has ended, and what cancels it."""
        outcome: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(asyncio.ensure_future(coroutine))
            tasks[0].add_done_callback(functools.partial(_pass_on, outcome))

        def cancel() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so it has ended
                loop.call_soon_threadsafe(lambda: tasks[0].cancel())

        try:
            with self._lock:  # whatever is begun is begun before the loop is told to stop
                loop = self._started()
                loop.call_soon_threadsafe(begin)
        except ClientClosedError:
            coroutine.close()
            raise
        return outcome, cancel

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._is_closed:
            raise ClientClosedError("the client is closed")
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._main, args=(self._loop,), name=self._name, daemon=True)
            self._thread.start()
        return self._loop

    @staticmethod
    def _main(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()


def _pass_on(outcome: Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        outcome.set_exception(CancelledError())
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


_END = object()


async def _next_or_end(items: AsyncGenerator[object, None], running: list[asyncio.Task[Any]]) -> object:
    """Returns the next item; ``running`` then holds the task that asked for it."""
    running[:] = [task] if (task := asyncio.current_task()) is not None else []
    return await anext(items, _END)


async def _close(items: AsyncGenerator[object, None], running: list[asyncio.Task[Any]]) -> None:
    """Closes ``items``; what still asks for an item, because an interrupt came just as it began, ends first."""
    left = [task for task in running if not task.done()]
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left)
    await items.aclose()


class ThreadedIterator(AsyncIterator[T], Generic[T]):
    """Iterates a blocking iterable in a thread of its own, ahead of who asks for as long as there is room.

    A thread, and not the caller's between two results: an iterable that waits for its next item must
    not hold back the answers to those before it. It wakes the loop once for all items that are there
    when the loop looks.

    Args:
        iterable: what is iterated.
        room: how many items are taken from it at first; ``make_room`` lets it take more.
    """

    def __init__(self, iterable: Iterable[T], room: int) -> None:
        self._iterable = iterable
        self._room = room
        self._more_room: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._items: deque[object] = deque()
        self._error: Exception | None = None  # which ended the iteration
        self._has_items = asyncio.Event()
        self._is_woken = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    async def __anext__(self) -> T:
        if self._thread is None:
            loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._main, args=(loop,), name="modelport-batches", daemon=True)
            self._thread.start()
        while not self._items:
            self._has_items.clear()
            await self._has_items.wait()
        if self._items[0] is not _END:
            return cast("T", self._items.popleft())
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def make_room(self, count: int) -> None:
        """Lets so many more items be taken; any thread may call this."""
        self._more_room.put(count)

    def close(self) -> None:
        """Ends the thread and waits a moment for it; if the iterable blocks, it ends when that goes on.

        Does not wait where the garbage collector may close it: in that thread, and in the loop's, which it waits for.
        """
        self._is_closed = True
        self.make_room(0)
        if self._thread not in (None, threading.current_thread()) and not _is_in_loop():
            self._thread.join(_JOIN_TIMEOUT_S)

    def _main(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            iterator = iter(self._iterable)
            item: object = None
            while item is not _END and self._takes_room():
                item = next(iterator, _END)
                self._hand_over(item, loop)
        except Exception as error:
            self._error = error
            self._hand_over(_END, loop)

    def _takes_room(self) -> bool:
        """Waits for the room that one item takes; returns False if none is to be taken any more."""
        while not self._room and not self._is_closed:
            self._room += self._more_room.get()
        self._room -= 1
        return not self._is_closed

    def _hand_over(self, item: object, loop: asyncio.AbstractEventLoop) -> None:
        self._items.append(item)
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits any more
                loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_woken = False  # before it looks: what comes later wakes the loop again
        self._has_items.set()


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
