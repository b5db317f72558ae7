"""Joins calls that wait at the same moment into one message.

A message takes several times as long as what a small call itself has to do, on both sides. Calls wait for the
end of the event loop's present iteration and for nothing else: there is no timer, and a call that finds no others
goes by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import grpc.aio

from modelport import _status
from modelport._options import MIB
from modelport.exceptions import ClientClosedError, RpcError
from modelport.v1 import prediction_pb2

METHOD = "/modelport.v1.PredictionService/PredictMany"
_FEW_CALLS = 32
"""More calls than this go in two messages or more, so that the server has one to work on while the next is made."""
_MOST_CALLS = 128
"""How many calls a message joins at most."""
_MOST_BYTES = MIB
_ROOM_BYTES = 64
"""What a call adds to a message besides its request."""
_Code = grpc.StatusCode
_TIMED_OUT = "Deadline Exceeded"
"""What gRPC says itself."""

Outcome = prediction_pb2.PredictResponse | RpcError | None
"""How a joined call ended: its answer, or an error that may pass or not.

None where that says nothing of the call, which is to be made by itself then.
"""
Finish = Callable[[RpcError | None, prediction_pb2.PredictRequest, float], Awaitable[prediction_pb2.PredictResponse]]
"""Goes on with a call that has no answer, its error at hand if it got one: makes it by itself, or raises the error."""


class Stream(Protocol):
    """The part of grpc.aio's unary-stream call that is used here."""

    def __aiter__(self) -> AsyncIterator[prediction_pb2.PredictManyResponse]: ...
    def cancel(self) -> bool: ...


class Method(Protocol):
    """The RPC, which takes a serialised PredictManyRequest."""

    def __call__(self, request: bytes, timeout: float | None = None) -> Stream: ...


class _Place(Protocol):
    """Where an outcome goes: a future of asyncio, or what a thread waits for."""

    def done(self) -> bool: ...
    def cancel(self) -> bool: ...
    def exception(self) -> BaseException | None: ...
    def set_result(self, result: Outcome, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


class _Wait:
    """What a thread waits for. A bare lock: ``concurrent.futures`` takes several times as long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._is_done = False
        self._result: Outcome = None
        self._exception: BaseException | None = None

    def wait(self) -> prediction_pb2.PredictResponse:
        """Returns or raises what the call ended with."""
        self._lock.acquire()
        if self._exception is not None:
            raise self._exception
        assert isinstance(self._result, prediction_pb2.PredictResponse)
        return self._result

    def done(self) -> bool:
        return self._is_done

    def cancel(self) -> bool:
        if self._is_done:
            return False
        self.set_exception(_closed())
        return True

    def exception(self) -> BaseException | None:
        return self._exception

    def set_result(self, result: Outcome, /) -> None:
        self._result = result
        self._end()

    def set_exception(self, exception: BaseException, /) -> None:
        self._exception = exception
        self._end()

    def _end(self) -> None:
        self._is_done = True
        self._lock.release()


@dataclass(eq=False, slots=True)
class _Entry:
    """One call."""

    request: prediction_pb2.PredictRequest
    raw: bytes
    """A PredictManyRequest of this call alone: protobuf joins messages by writing one after another."""
    deadline: float
    outcome: _Place
    message: _Message | None = field(default=None, init=False)
    task: asyncio.Task[None] | None = field(default=None, init=False)
    """What makes the call by itself, for a thread."""

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for the message that it is in."""
        return not self.outcome.done() and self.task is None


class Joiner:
    """The calls of one client that wait for the end of the event loop's iteration.

    Args:
        server: the address for messages.
        max_message_bytes: the largest message.
        may_retry: whether a call may be sent again when the connection was lost.
        finish: goes on with a thread's call that has no answer.
        on_answer: called for every answer.
    """

    def __init__(
        self,
        server: str,
        max_message_bytes: int,
        *,
        may_retry: bool,
        finish: Finish,
        on_answer: Callable[[], object],
    ) -> None:
        self.may_retry = may_retry
        self._server = server
        self._most_bytes = min(_MOST_BYTES, max_message_bytes)
        self._finish = finish
        self._on_answer = on_answer
        self._waiting: list[_Entry] = []
        self._handed: deque[_Entry] = deque()
        self._is_woken = False
        self._is_known = True
        self._is_closed = False
        self._tasks: dict[asyncio.Task[None], Sequence[_Entry]] = {}

    def takes(self, byte_count: int) -> bool:
        """Returns whether a call of so many bytes may be joined with others: it is small, and the server knows how."""
        return self._is_known and byte_count + _ROOM_BYTES <= self._most_bytes // 2

    async def outcome(self, method: Method, request: prediction_pb2.PredictRequest, deadline: float) -> Outcome:
        """Makes a call together with those that wait at the same moment, and returns how it ended.

        Cancelling it leaves the others alone.

        Raises:
            RpcError: if the call's time is over, or nobody answers.
            ClientClosedError: if the client is closed meanwhile.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        entry = _Entry(request, _raw(request, deadline), deadline, future)
        self._waiting.append(entry)
        if len(self._waiting) == 1:
            loop.call_soon(self._send, method)
        try:
            return await future
        finally:
            if entry.message is not None and future.cancelled():
                entry.message.on_given_up()

    def hand_over(
        self,
        method: Method,
        request: prediction_pb2.PredictRequest,
        deadline: float,
        call_soon: Callable[[Callable[[], object]], None],
    ) -> prediction_pb2.PredictResponse:
        """Makes a call for a thread that is not the event loop's, and waits for its answer.

        Calls that are handed over until the loop looks go together; only the first of them wakes it.

        Args:
            method: the RPC.
            request: what is asked.
            deadline: when the call's time is over, on the monotonic clock.
            call_soon: has something called in the loop; raises ClientClosedError if that is closed.

        Raises:
            RpcError: if the server answers with an error, or there is none.
            ClientClosedError: if the client is closed, before or meanwhile.
        """
        outcome = _Wait()
        entry = _Entry(request, _raw(request, deadline), deadline, outcome)
        self._handed.append(entry)
        if self._is_closed:  # after it was closed nobody looks; before that, ``close`` ends what was handed over
            raise _closed()
        if not self._is_woken:
            self._is_woken = True
            call_soon(functools.partial(self._take, method))
        try:
            return outcome.wait()
        except BaseException:
            if not outcome.done():  # an interrupt, which the loop knows nothing of
                with contextlib.suppress(ClientClosedError):
                    call_soon(functools.partial(self._give_up, entry))
            raise

    async def close(self) -> None:
        """Ends all calls."""
        self._is_closed = True
        self._take_handed()
        entries = [*self._waiting, *(entry for entries in self._tasks.values() for entry in entries)]
        self._waiting = []
        for entry in entries:
            _fail(entry, _closed())
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, method: Method) -> None:
        self._is_woken = False  # before it looks: who comes later wakes the loop again
        self._take_handed()
        self._send(method)

    def _take_handed(self) -> None:
        while self._handed:
            self._waiting.append(self._handed.popleft())

    @staticmethod
    def _give_up(entry: _Entry) -> None:
        entry.outcome.cancel()
        if entry.message is not None:
            entry.message.on_given_up()
        if entry.task is not None:
            entry.task.cancel()

    def _send(self, method: Method) -> None:
        entries = [entry for entry in self._waiting if not entry.outcome.done()]
        self._waiting = []
        for group in self._groups(entries):
            if len(group) > 1 and self._is_known:
                message = _Message(group, self._server, self)
                self._begin(message.run(method), group)
            else:
                for entry in group:
                    self.go_on(entry, None)

    def _begin(self, work: Coroutine[None, None, None], entries: Sequence[_Entry]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = entries
        task.add_done_callback(self._tasks.pop)
        return task

    def _groups(self, entries: Sequence[_Entry]) -> list[list[_Entry]]:
        groups: list[list[_Entry]] = []
        size = 0
        most = min(max(_FEW_CALLS, (len(entries) + 1) // 2), _MOST_CALLS)
        for entry in entries:
            size += len(entry.raw)
            if not groups or len(groups[-1]) >= most or size > self._most_bytes:
                groups.append([])
                size = len(entry.raw)
            groups[-1].append(entry)
        return groups

    def forget(self) -> None:
        """The server does not know the RPC: calls go by themselves from now on."""
        self._is_known = False

    def answer(self, entry: _Entry, response: prediction_pb2.PredictResponse) -> None:
        """Ends a call with its answer."""
        self._on_answer()
        entry.outcome.set_result(response)

    def go_on(self, entry: _Entry, failure: RpcError | None) -> None:
        """Has a call without an answer go on by itself: a coroutine sees to that, a thread only waits."""
        if not isinstance(entry.outcome, _Wait):
            entry.outcome.set_result(failure)
            return
        entry.task = self._begin(self._by_itself(entry, failure), [entry])

    async def _by_itself(self, entry: _Entry, failure: RpcError | None) -> None:
        try:
            response = await self._finish(failure, entry.request, entry.deadline)
            if not entry.outcome.done():
                entry.outcome.set_result(response)
        except Exception as error:
            _fail(entry, error)
        finally:
            entry.outcome.cancel()  # does nothing, unless this task was cancelled


class _Message:
    """Several calls on their way in one message.

    Args:
        entries: the calls, in their order.
        server: the address for messages.
        joiner: whose calls they are.
    """

    def __init__(self, entries: Sequence[_Entry], server: str, joiner: Joiner) -> None:
        self._entries = entries
        self._server = server
        self._joiner = joiner
        self._stream: Stream | None = None
        self._expiry: asyncio.TimerHandle | None = None
        for entry in entries:
            entry.message = self

    async def run(self, method: Method) -> None:
        """Sends the message and ends every call with its result."""
        try:
            latest = max(entry.deadline for entry in self._entries)
            self._watch_deadlines()
            raw = b"".join([entry.raw for entry in self._entries])
            self._stream = method(raw, timeout=max(0.0, latest - time.monotonic()))
            async for response in self._stream:
                for result in response.results:
                    self._settle(result)
            self._go_on()
        except grpc.aio.AioRpcError as error:
            self._on_broken(error)
        except Exception as error:
            for entry in self._waiting():
                _fail(entry, error)
        finally:
            if self._expiry is not None:
                self._expiry.cancel()
            if self._stream is not None:
                self._stream.cancel()
            for entry in self._entries:
                if entry.is_waiting:
                    entry.outcome.cancel()  # there are none, unless this task was cancelled
                entry.message = None  # they would hold each other

    def _waiting(self) -> list[_Entry]:
        return [entry for entry in self._entries if entry.is_waiting]

    def on_given_up(self) -> None:
        """One of the callers is gone; if that was the last one, nobody waits for the message."""
        if self._stream is not None and not self._waiting():
            self._stream.cancel()

    def _settle(self, result: prediction_pb2.JoinedResult) -> None:
        if result.index >= len(self._entries):
            return
        entry = self._entries[result.index]
        if not entry.is_waiting:
            return
        kind = result.WhichOneof("kind")
        if kind == "response":
            self._joiner.answer(entry, result.response)
        else:  # None is a kind that only a later version knows
            self._joiner.go_on(entry, self._error(result.error) if kind == "error" else None)

    def _go_on(self) -> None:
        for entry in self._waiting():
            self._joiner.go_on(entry, None)

    def _error(self, error: prediction_pb2.StreamError) -> RpcError:
        retry_after_s = error.retry_after_ms / 1000 or None
        code = _status.code_of_number(error.code)
        return _status.rpc_error(code, error.message, server=self._server, retry_after_s=retry_after_s)

    def _on_broken(self, error: grpc.aio.AioRpcError) -> None:
        """Has the calls that have no result go on by themselves, where another attempt may be made."""
        code = error.code()
        if code is _Code.UNIMPLEMENTED:
            self._joiner.forget()
        is_lost = code in (_Code.UNAVAILABLE, _Code.CANCELLED) and not self._joiner.may_retry
        if not is_lost and code is not _Code.DEADLINE_EXCEEDED:
            self._go_on()
            return
        for entry in self._waiting():
            failure = _status.from_aio(error, self._server)
            failure.__cause__ = error
            _fail(entry, failure)

    def _watch_deadlines(self) -> None:
        """Sees to it that calls end at deadlines of their own."""
        left = [entry.deadline for entry in self._waiting()]
        self._expiry = None
        if left:
            delay_s = max(0.0, min(left) - time.monotonic())
            self._expiry = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        now = time.monotonic()
        for entry in self._waiting():
            if entry.deadline <= now:
                _fail(entry, _status.rpc_error(_Code.DEADLINE_EXCEEDED, _TIMED_OUT, server=self._server))
        self._watch_deadlines()
        self.on_given_up()


def _raw(request: prediction_pb2.PredictRequest, deadline: float) -> bytes:
    left_us = max(1, int((deadline - time.monotonic()) * 1e6))
    joined = prediction_pb2.JoinedRequest(request=request, timeout_us=left_us)
    return prediction_pb2.PredictManyRequest(requests=[joined]).SerializeToString()


def _closed() -> ClientClosedError:
    return ClientClosedError("the client was closed during the call")


def _fail(entry: _Entry, error: Exception) -> None:
    if not entry.outcome.done():
        entry.outcome.set_exception(error)
        entry.outcome.exception()  # seen, should its caller be cancelled at this very moment
