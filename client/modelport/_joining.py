"""Joins calls that wait at the same moment into one message.

A message takes several times as long as what a small call itself has to do, on both sides. Calls wait for the
end of the event loop's present iteration and for nothing else: there is no timer, and a call that finds no others
goes by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import grpc.aio

from modelport import _status
from modelport._options import MIB
from modelport.exceptions import ClientClosedError, RpcError
from modelport.v1 import prediction_pb2

METHOD = "/modelport.v1.PredictionService/PredictMany"
_MOST_CALLS = 64
"""How many calls a message joins at most: the next message can be made while the server works on this one."""
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


class Stream(Protocol):
    """The part of grpc.aio's unary-stream call that is used here."""

    def __aiter__(self) -> AsyncIterator[prediction_pb2.PredictManyResponse]: ...
    def cancel(self) -> bool: ...


class Method(Protocol):
    """The RPC, which takes a serialised PredictManyRequest."""

    def __call__(self, request: bytes, timeout: float | None = None) -> Stream: ...


@dataclass(eq=False, slots=True)
class _Entry:
    """One call."""

    raw: bytes
    """A PredictManyRequest of this call alone: protobuf joins messages by writing one after another."""
    deadline: float
    outcome: asyncio.Future[Outcome]
    message: _Message | None = field(default=None, init=False)


class Joiner:
    """The calls of one client that wait for the end of the event loop's iteration.

    Args:
        server: the address for messages.
        max_message_bytes: the largest message.
    """

    def __init__(self, server: str, max_message_bytes: int) -> None:
        self._server = server
        self._most_bytes = min(_MOST_BYTES, max_message_bytes)
        self._waiting: list[_Entry] = []
        self._messages: dict[_Message, asyncio.Task[None]] = {}
        self._is_known = True

    def takes(self, request: prediction_pb2.PredictRequest) -> bool:
        """Returns whether a call may be joined with others: it is small, and the server knows how."""
        return self._is_known and request.ByteSize() + _ROOM_BYTES <= self._most_bytes // 2

    async def outcome(self, method: Method, request: prediction_pb2.PredictRequest, deadline: float) -> Outcome:
        """Makes a call together with those that wait at the same moment, and returns how it ended.

        Cancelling it leaves the others alone.

        Raises:
            RpcError: if the call's time is over, or nobody answers.
            ClientClosedError: if the client is closed meanwhile.
        """
        loop = asyncio.get_running_loop()
        left_us = max(1, int((deadline - time.monotonic()) * 1e6))
        joined = prediction_pb2.JoinedRequest(request=request, timeout_us=left_us)
        raw = prediction_pb2.PredictManyRequest(requests=[joined]).SerializeToString()
        entry = _Entry(raw, deadline, loop.create_future())
        self._waiting.append(entry)
        if len(self._waiting) == 1:
            loop.call_soon(self._send, method)
        try:
            return await entry.outcome
        finally:
            if entry.message is not None and entry.outcome.cancelled():
                entry.message.on_given_up()

    async def close(self) -> None:
        """Ends all calls."""
        error = ClientClosedError("the client was closed during the call")
        waiting, self._waiting = self._waiting, []
        for entry in waiting:
            _fail(entry, error)
        for message in self._messages:
            message.fail(error)
        tasks = list(self._messages.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _send(self, method: Method) -> None:
        entries = [entry for entry in self._waiting if not entry.outcome.done()]
        self._waiting = []
        for group in self._groups(entries):
            if len(group) == 1 or not self._is_known:
                for entry in group:
                    entry.outcome.set_result(None)
                continue
            message = _Message(group, self._server, self._forget)
            task = asyncio.get_running_loop().create_task(message.run(method))
            self._messages[message] = task
            task.add_done_callback(lambda _, message=message: self._messages.pop(message))  # type: ignore[misc]

    def _groups(self, entries: Sequence[_Entry]) -> list[list[_Entry]]:
        groups: list[list[_Entry]] = []
        size = 0
        for entry in entries:
            size += len(entry.raw)
            if not groups or len(groups[-1]) >= _MOST_CALLS or size > self._most_bytes:
                groups.append([])
                size = len(entry.raw)
            groups[-1].append(entry)
        return groups

    def _forget(self) -> None:
        """The server does not know the RPC: calls go by themselves from now on."""
        self._is_known = False


class _Message:
    """Several calls on their way in one message.

    Args:
        entries: the calls, in their order.
        server: the address for messages.
        on_unknown: called if the server does not know the RPC.
    """

    def __init__(self, entries: Sequence[_Entry], server: str, on_unknown: Callable[[], None]) -> None:
        self._entries = entries
        self._server = server
        self._on_unknown = on_unknown
        self._stream: Stream | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._was_answered = False
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
                self._was_answered = True
                for result in response.results:
                    self._settle(result)
            self._send_alone()
        except grpc.aio.AioRpcError as error:
            self._on_broken(error)
        except Exception as error:
            self.fail(error)
        finally:
            if self._expiry is not None:
                self._expiry.cancel()
            if self._stream is not None:
                self._stream.cancel()
            for entry in self._entries:
                entry.outcome.cancel()  # does nothing, unless this task was cancelled

    def on_given_up(self) -> None:
        """One of the callers is gone; if that was the last one, nobody waits for the message."""
        if self._stream is not None and all(entry.outcome.done() for entry in self._entries):
            self._stream.cancel()

    def fail(self, error: Exception) -> None:
        """Ends all calls that have no result with an error."""
        for entry in self._entries:
            _fail(entry, error)

    def _settle(self, result: prediction_pb2.JoinedResult) -> None:
        if result.index >= len(self._entries):
            return
        outcome = self._entries[result.index].outcome
        if outcome.done():
            return
        kind = result.WhichOneof("kind")
        if kind == "response":
            outcome.set_result(result.response)
        elif kind == "error":
            outcome.set_result(self._error(result.error))
        else:
            outcome.set_result(None)  # a kind that only a later version knows

    def _send_alone(self) -> None:
        for entry in self._entries:
            if not entry.outcome.done():
                entry.outcome.set_result(None)

    def _error(self, error: prediction_pb2.StreamError) -> RpcError:
        retry_after_s = error.retry_after_ms / 1000 or None
        code = _status.code_of_number(error.code)
        return _status.rpc_error(code, error.message, server=self._server, retry_after_s=retry_after_s)

    def _on_broken(self, error: grpc.aio.AioRpcError) -> None:
        """Ends the calls that have no result: by the message's error where each of them would have got the same."""
        code = error.code()
        if code is _Code.UNIMPLEMENTED:
            self._on_unknown()
        was_refused = code in (_Code.UNAVAILABLE, _Code.CANCELLED) and not self._was_answered
        if not was_refused and code is not _Code.DEADLINE_EXCEEDED:
            self._send_alone()
            return
        for entry in self._entries:  # gRPC has tried again as often as it may
            failure = _status.from_aio(error, self._server)
            failure.__cause__ = error
            _fail(entry, failure)

    def _watch_deadlines(self) -> None:
        """Sees to it that calls end at deadlines of their own."""
        left = [entry.deadline for entry in self._entries if not entry.outcome.done()]
        self._expiry = None
        if left:
            delay_s = max(0.0, min(left) - time.monotonic())
            self._expiry = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        now = time.monotonic()
        for entry in self._entries:
            if entry.deadline <= now and not entry.outcome.done():
                _fail(entry, _status.rpc_error(_Code.DEADLINE_EXCEEDED, _TIMED_OUT, server=self._server))
        self._watch_deadlines()
        self.on_given_up()


def _fail(entry: _Entry, error: Exception) -> None:
    if not entry.outcome.done():
        entry.outcome.set_exception(error)
        entry.outcome.exception()  # seen, should its caller be cancelled at this very moment
