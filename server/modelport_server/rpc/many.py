"""One PredictMany call: several requests in one message, each served as a Predict call of its own."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic

from modelport.v1 import prediction_pb2 as pb
from modelport_server.batching.calls import Answer, Call
from modelport_server.errors import CallerGoneError, InvalidCallError, StalledError
from modelport_server.options import MIB, RpcOptions
from modelport_server.routing import Router
from modelport_server.rpc._grpc import Context, deadline_of
from modelport_server.rpc._requests import parse
from modelport_server.rpc.codec import to_request, to_response, too_large
from modelport_server.rpc.status import status_of
from modelport_server.servable import Servable

MAX_REQUESTS = 1024
"""The most requests of one message; ``prediction.proto`` says so too."""
_AT_ONCE = 64
"""How many requests are taken, or results sent, before whatever else there is to do has its turn."""
_MESSAGE_BYTES = MIB
"""A message of results is sent once it has so many bytes, though more results may be there."""
_ROOM_BYTES = 32
"""What a message may hold besides the only result's answer."""


@dataclass(frozen=True, slots=True, eq=False)
class _Joined:
    """One of the requests, and who answers it."""

    index: int
    sequence: int
    outputs: tuple[str, ...] = ()
    servable: Servable | None = None


class PredictMany:
    """Starts all requests at once and sends their results as they come, each exactly once.

    What is wrong with a request becomes its result. No task is made for a request: the batcher ends its call, and
    the results that are there when the writer has its turn go in one message.

    Args:
        router: finds the servables.
        options: bounds of messages, and of the time that they may wait to be read.
        context: the call.
    """

    def __init__(self, router: Router, options: RpcOptions, context: Context) -> None:
        self._router = router
        self._options = options
        self._context = context
        self._calls: dict[int, Call] = {}
        self._ended: deque[tuple[_Joined, Answer | BaseException]] = deque()
        self._wake = asyncio.Event()
        self._message = object()

    async def serve(self, raw: bytes) -> None:
        """Answers every request of the message.

        Raises:
            InvalidCallError: if it is none, or has no requests or too many.
        """
        requests = _requests(raw)
        try:
            await self._start(requests)
            unanswered = len(requests)
            while unanswered:
                if not self._ended:
                    self._wake.clear()
                    await self._wake.wait()
                results = self._results()
                await self._send(pb.PredictManyResponse(results=results).SerializeToString())
                unanswered -= len(results)
        finally:
            for call in list(self._calls.values()):
                call.future.cancel()  # it is taken out of its queue

    async def _start(self, requests: Sequence[pb.JoinedRequest]) -> None:
        deadline = deadline_of(self._context)
        for first in range(0, len(requests), _AT_ONCE):
            if first:
                await asyncio.sleep(0)
            self._start_some(range(first, min(first + _AT_ONCE, len(requests))), requests, deadline)

    def _start_some(self, indices: range, requests: Sequence[pb.JoinedRequest], deadline: float) -> None:
        now = monotonic()
        for index in indices:
            joined = requests[index]
            due = min(deadline, now + joined.timeout_us / 1e6) if joined.timeout_us else deadline
            self._begin(index, joined.request, due)

    def _begin(self, index: int, message: pb.PredictRequest, deadline: float) -> None:
        """Queues a request's call; whatever is wrong with it becomes its result."""
        joined = _Joined(index, message.sequence)
        try:
            request = to_request(message, 0)
            servable = self._router.resolve(
                request.model, version=request.version, alias=request.alias, key=request.routing_key
            )
            joined = _Joined(index, request.sequence, request.outputs, servable)
            call = servable.prepare(request.signature, request.inputs, request.outputs, deadline)
        except Exception as error:  # status_of logs what it does not know
            self._ended.append((joined, error))
            return
        call.message = self._message
        call.movable = request.version is None and request.alias is None
        servable.acquire()
        call.future.add_done_callback(partial(self._on_end, joined, servable))
        self._calls[index] = call
        try:
            servable.submit(call)
        except Exception as error:  # else it would end its neighbours, too
            call.fail(error)

    def _on_end(self, joined: _Joined, servable: Servable, future: asyncio.Future[Answer]) -> None:
        servable.release()
        del self._calls[joined.index]
        if future.cancelled():
            self._ended.append((joined, CallerGoneError("the call was given up")))
        else:
            self._ended.append((joined, future.exception() or future.result()))
        self._wake.set()

    def _results(self) -> list[pb.JoinedResult]:
        """Returns the next results that are there, as many as go into a message."""
        results: list[pb.JoinedResult] = []
        size = 0
        while self._ended and len(results) < _AT_ONCE and size < _MESSAGE_BYTES:
            result = _result(*self._ended[0], self._options.max_message_bytes)
            size += result.ByteSize() + _ROOM_BYTES
            if results and size > self._options.max_message_bytes:
                break
            results.append(result)
            self._ended.popleft()
        return results

    async def _send(self, message: bytes) -> None:
        stall_s = self._options.stream_stall_s
        try:
            sent = self._context.send(message)
            if sent is not None:
                async with asyncio.timeout(stall_s):
                    await sent
        except TimeoutError:
            raise StalledError(f"the results were not read for {stall_s:g} s", retry_after_s=0.0) from None
        except Exception as error:
            raise CallerGoneError("the caller is gone") from error


def _requests(raw: bytes) -> Sequence[pb.JoinedRequest]:
    requests = parse(pb.PredictManyRequest, raw).requests
    if not 1 <= len(requests) <= MAX_REQUESTS:
        raise InvalidCallError(f"PredictMany takes 1 to {MAX_REQUESTS} requests, not {len(requests)}")
    return requests


def _result(joined: _Joined, outcome: Answer | BaseException, max_bytes: int) -> pb.JoinedResult:
    error = outcome
    if isinstance(outcome, Answer) and joined.servable is not None:
        response = to_response(joined.servable.model, outcome, joined.outputs, joined.sequence)
        size = response.ByteSize()
        if size + _ROOM_BYTES <= max_bytes:
            return pb.JoinedResult(index=joined.index, response=response)
        error = too_large(size, max_bytes)
    assert isinstance(error, BaseException)
    status = status_of(error)
    return pb.JoinedResult(
        index=joined.index,
        error=pb.StreamError(
            sequence=joined.sequence,
            code=status.number,
            message=status.message,
            version=joined.servable.version if joined.servable is not None else 0,
            retry_after_ms=status.retry_after_ms,
        ),
    )
