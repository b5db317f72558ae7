"""Runs a stream of batches: pulls them, keeps a connection, hands out results."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio

from modelport import _status
from modelport._conversation import Conversation, Ending
from modelport._options import StreamOptions, Target
from modelport._results import StreamResult
from modelport._retry import Retrier
from modelport.exceptions import ClientClosedError, ModelportError, RpcError, StreamInterruptedError
from modelport.v1 import prediction_pb2

_Code = grpc.StatusCode
_MASKED = "Internal error from Core"
"""What grpc.aio says in place of the server's status if the stream ends while a write is in flight."""
_CLOSE_TIMEOUT_S = 1.0

Batch = prediction_pb2.PredictStreamRequest | ModelportError


class Call(Protocol):
    """The part of grpc.aio's stream-stream call that is used here."""

    def __aiter__(self) -> AsyncIterator[prediction_pb2.PredictStreamResponse]: ...
    async def write(self, request: prediction_pb2.PredictStreamRequest) -> None: ...
    async def done_writing(self) -> None: ...
    def cancel(self) -> bool: ...
    async def code(self) -> grpc.StatusCode: ...
    async def details(self) -> str: ...
    async def trailing_metadata(self) -> _status.Metadata: ...


@dataclass(frozen=True, slots=True)
class _End:
    """How a connection ended."""

    code: grpc.StatusCode
    details: str
    retry_after_s: float | None = None

    @property
    def is_lost_connection(self) -> bool:
        """Whether this says more about the connection than about the call."""
        return (
            self.code in (_Code.OK, _Code.UNAVAILABLE, _Code.CANCELLED)
            or (self.code is _Code.INTERNAL and self.details == _MASKED)
            or (self.code is _Code.UNKNOWN and self.details == "Stream removed")
        )

    @property
    def may_pass(self) -> bool:
        """Whether the same call may well succeed a little later."""
        if self.code is _Code.RESOURCE_EXHAUSTED:
            return "larger than max" not in self.details
        return self.is_lost_connection or self.code in (_Code.INTERNAL, _Code.DEADLINE_EXCEEDED)

    @property
    def is_refused(self) -> bool:
        """Whether there was no connection at all."""
        return _status.is_unreachable(self.code, self.details)


class _Signal:
    """Wakes the one task that waits for it; an Event, for which any number may wait, takes several times as long."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Wakes the task, if it waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Waits until it is set from now on."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


class BulkCall:
    """One stream of batches, over as many connections as it takes.

    Two tasks work for it, one that pulls batches and one that keeps a connection; both end with
    ``aclose``, which must be called.

    Args:
        conversation: the stream's books.
        open_call: begins a new PredictStream call.
        source: the requests, one a batch; an exception in a batch's place is its outcome.
        options: how the stream is run.
        retrier: how long to wait before another connection.
        server: the address for messages.
    """

    def __init__(
        self,
        conversation: Conversation,
        open_call: Callable[[], Awaitable[Call]],
        source: AsyncGenerator[Batch, None],
        *,
        target: Target,
        options: StreamOptions,
        retrier: Retrier,
        server: str,
    ) -> None:
        self._conversation = conversation
        self._open_call = open_call
        self._source = source
        self._target = target
        self._options = options
        self._retrier = retrier
        self._server = server
        self._tasks: list[asyncio.Task[None]] = []
        self._is_input_done = False
        self._input_error: BaseException | None = None
        self._failure: BaseException | None = None
        self._losses = 0  # connections in a row that brought no answer
        self._lost_at = 0.0
        self._answer_due: float | None = None  # on the connection at hand, if one is waited for
        self._to_send = _Signal()
        self._to_take = _Signal()
        self._room = _Signal()

    async def results(self, limit: int) -> list[StreamResult]:
        """Waits for and returns the next results in order, ``limit`` at most; none at the end.

        Raises:
            StreamInterruptedError: if the stream broke and could not be resumed in time.
            RpcError: if the server refuses the stream, or a batch failed and errors are not returned.
            Exception: whatever the source of batches raised.
        """
        self._start()
        while True:
            if results := self._conversation.take(limit):
                self._room.set()
                return self._checked(results)
            if self._failure is not None:
                raise self._failure
            if self._is_input_done and self._conversation.is_empty:
                if self._input_error is not None:
                    raise self._input_error
                return []
            await self._to_take.wait()

    async def aclose(self) -> None:
        """Ends the stream, whatever its state."""
        self._fail(ClientClosedError("the stream was closed"))
        if not self._tasks:
            return
        feed, run = self._tasks
        feed.cancel()
        if self._is_input_done and self._conversation.is_empty:
            await asyncio.wait({run}, timeout=_CLOSE_TIMEOUT_S)  # lets the server end it in its own way
        run.cancel()
        await asyncio.gather(feed, run, return_exceptions=True)
        await self._source.aclose()

    def _start(self) -> None:
        if not self._tasks and self._failure is None:
            self._tasks = [asyncio.create_task(self._feed()), asyncio.create_task(self._run())]

    def _checked(self, results: list[StreamResult]) -> list[StreamResult]:
        error = results[-1].error
        if error is None or self._options.return_errors:
            return results
        self._fail(error)
        raise error

    def _fail(self, failure: BaseException) -> None:
        if self._failure is None:
            self._failure = failure
        self._to_take.set()

    async def _feed(self) -> None:
        try:
            while True:
                while not self._conversation.has_room:
                    await self._room.wait()
                self._conversation.add(await anext(self._source))
                self._to_send.set()
                if self._conversation.has_result:
                    self._to_take.set()
        except StopAsyncIteration:
            pass
        except Exception as error:
            self._input_error = error
        finally:
            self._is_input_done = True
            self._to_send.set()
            self._to_take.set()

    async def _run(self) -> None:
        try:
            while await self._has_work():
                end = await self._connection()
                await asyncio.sleep(self._wait_s(end))
        except Exception as error:
            self._fail(error)

    async def _has_work(self) -> bool:
        """Waits until there is something to send; returns False when there never will be."""
        while self._conversation.is_idle:
            if self._is_input_done:
                return False
            await self._to_send.wait()
        return True

    async def _connection(self) -> _End:
        self._conversation.begin_connection()
        self._answer_due = None
        patience = asyncio.timeout(None)
        call = await self._open_call()
        writer = asyncio.create_task(self._write(call))
        watcher = asyncio.create_task(self._watch(patience))
        try:
            async with patience:
                await self._read(call)
                if self._conversation.ending is Ending.PIN_REFUSED:
                    return _End(_Code.OK, "")
                return await _end_of(call)
        except TimeoutError:
            text = f"no answer came for {self._options.answer_timeout_s:g} s"
            return _End(_Code.DEADLINE_EXCEEDED, text)
        finally:
            call.cancel()
            writer.cancel()
            watcher.cancel()
            await asyncio.gather(writer, watcher, return_exceptions=True)

    async def _read(self, call: Call) -> None:
        try:
            async for message in call:
                now = time.monotonic()
                self._conversation.receive(message, now)
                self._be_patient(now)
                if self._conversation.has_result:
                    self._to_take.set()
                if self._conversation.has_unsent or self._is_finished():
                    self._to_send.set()
                if self._conversation.ending is Ending.PIN_REFUSED:
                    return
        except grpc.aio.AioRpcError:
            pass  # the call itself says how it ended

    async def _write(self, call: Call) -> None:
        """Sends what there is to send, until the stream has ended or had better end."""
        try:
            while not self._is_finished():
                now = time.monotonic()
                message = self._conversation.next_message(now)
                if message is None:
                    await self._wait_to_send(now)
                else:
                    if self._answer_due is None:
                        self._be_patient(now)
                    await call.write(message)
            await call.done_writing()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            pass  # the stream has ended, which the reader sees too

    def _be_patient(self, now: float) -> None:
        """Gives the next answer its time, from now; nobody waits where nothing was sent."""
        self._answer_due = now + self._options.answer_timeout_s if self._conversation.is_waiting else None

    async def _watch(self, patience: asyncio.Timeout) -> None:
        """Ends ``patience`` when an answer is overdue; looks now and then, since a timer for each answer costs more."""
        left_s = self._options.answer_timeout_s
        while left_s > 0:
            await asyncio.sleep(left_s)
            now = time.monotonic()
            left_s = self._options.answer_timeout_s if self._answer_due is None else self._answer_due - now
        patience.reschedule(asyncio.get_running_loop().time())

    def _is_finished(self) -> bool:
        if self._conversation.ending is not Ending.NONE:
            return True
        return self._is_input_done and self._conversation.is_idle

    async def _wait_to_send(self, now: float) -> None:
        due = self._conversation.next_time()
        if due is None or due <= now:
            await self._to_send.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(due - now):
                await self._to_send.wait()

    def _wait_s(self, end: _End) -> float:
        """Returns how long to wait before the next connection, in seconds.

        Raises:
            RpcError: if there had better be none.
            StreamInterruptedError: if it would come too late.
        """
        ending = self._conversation.ending
        if self._conversation.has_progressed or self._conversation.is_idle:
            self._losses = 0
            if end.may_pass or ending is not Ending.NONE or self._conversation.is_idle:
                return 0.0
        if ending is Ending.PIN_REFUSED:
            return 0.0
        if self._conversation.refuses_pin(end.code):
            self._conversation.pin_lost(end.details)
            return 0.0
        return self._wait_after_loss_s(end)

    def _wait_after_loss_s(self, end: _End) -> float:
        now = time.monotonic()
        if self._losses == 0:
            self._lost_at = now
        self._losses += 1
        error = _error(end, self._server)
        if not end.may_pass or self._is_hopeless(end):
            raise error
        wait_s = max(self._retrier.jittered_s(self._losses), end.retry_after_s or 0.0)
        if now + wait_s - self._lost_at > self._options.resume_timeout_s:
            raise self._interrupted(error) from error
        return wait_s

    def _is_hopeless(self, end: _End) -> bool:
        """Whether enough was tried: nobody was ever reached, or the server itself keeps failing."""
        if self._losses < self._retrier.policy.max_attempts:
            return False
        if end.is_lost_connection:
            return end.is_refused and not self._conversation.was_answered
        return not (end.code is _Code.RESOURCE_EXHAUSTED and self._conversation.was_answered)

    def _interrupted(self, error: RpcError) -> StreamInterruptedError:
        answered = self._conversation.taken
        unanswered = self._conversation.unanswered
        return StreamInterruptedError(
            f"the stream to {self._target.model} broke and could not be resumed within "
            f"{self._options.resume_timeout_s:g} s; {answered} batches were answered, {len(unanswered)} sent "
            f"and not answered: {error}",
            answered=answered,
            unanswered=unanswered,
        )


async def _end_of(call: Call) -> _End:
    metadata = await call.trailing_metadata()
    code, details = await call.code(), await call.details()
    return _End(code, details or "", _status.pushback_s(metadata))


def _error(end: _End, server: str) -> RpcError:
    if end.code is _Code.OK or end.details == _MASKED:
        text = f"the connection to {server} was closed without an answer"
        return _status.rpc_error(_Code.UNAVAILABLE, text, server=server)
    return _status.rpc_error(end.code, end.details, server=server, retry_after_s=end.retry_after_s)
