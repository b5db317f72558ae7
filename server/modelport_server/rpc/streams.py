"""One PredictStream call, from its first message to its end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from modelport.v1 import prediction_pb2 as pb
from modelport_server.batching.calls import Answer
from modelport_server.errors import CallerGoneError, InvalidCallError, StalledError, TooLargeError
from modelport_server.once import Signal
from modelport_server.options import RpcOptions
from modelport_server.routing import Router
from modelport_server.rpc._grpc import END_OF_STREAM, Context, deadline_of
from modelport_server.rpc.codec import Request, packed, parse_stream, to_request, to_response
from modelport_server.rpc.status import status_of
from modelport_server.servable import Servable


@dataclass(eq=False, slots=True)
class _Pending:
    """A message that has been read and not been answered."""

    sequence: int
    size: int
    """Bytes that it holds: the request's, or once there is one the answer's."""
    outputs: tuple[str, ...]
    servable: Servable | None
    result: asyncio.Future[Answer]


class PredictStream:
    """Reads messages as long as its window has room, and answers them in their order.

    A task of its own reads. The window bounds what a stream can hold of the server; beyond that, and while
    the servable's queue is full, it reads no further and HTTP/2's flow control holds its peer back.

    Args:
        router: finds the servable.
        options: bounds of the window.
        drain: set when the server is going to stop.
        context: the call.
    """

    def __init__(self, router: Router, options: RpcOptions, drain: Signal, context: Context) -> None:
        self._router = router
        self._options = options
        self._drain = drain
        self._context = context
        self._pending: deque[_Pending] = deque()
        self._pending_bytes = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._reading_ended = False
        self._notices: deque[pb.StreamNotice] = deque()
        self._retired = False
        self._closed = False
        self._first: pb.PredictRequest | None = None
        self._follow = False
        self._named = False
        self._pinned: Servable | None = None
        self._unsubscribe: list[Callable[[], None]] = []

    async def serve(self) -> None:
        """Answers until the caller has closed its side, or the version that it is pinned to is retired."""
        self._unsubscribe.append(self._drain.subscribe(self._on_drain))
        reader = asyncio.get_running_loop().create_task(self._read())
        reader.add_done_callback(self._on_reader_done)
        try:
            await self._write()
        finally:
            self._closed = True  # the reader, should it get another message, drops it
            self._room.set()
            for unsubscribe in self._unsubscribe:
                unsubscribe()
            for pending in self._pending:
                if not pending.result.cancel() and not pending.result.cancelled():
                    pending.result.exception()  # seen, though nobody is left to hear of it
            if self._pinned is not None:
                self._pinned.unpin()
        if reader.done() and not reader.cancelled() and (error := reader.exception()) is not None:
            raise error

    def _on_drain(self) -> None:
        version = self._pinned.version if self._pinned is not None else 0
        self._notices.append(
            pb.StreamNotice(
                reason=pb.StreamNotice.REASON_DRAINING,
                message="the server is stopping; what it has received will be answered",
                version=version,
            )
        )
        self._wake.set()

    def _on_retired(self) -> None:
        self._retired = True
        self._room.set()
        self._wake.set()

    def _on_reader_done(self, reader: asyncio.Task[None]) -> None:
        if self._closed and not reader.cancelled():
            reader.exception()  # a read that the end of the call has cut short: of no interest any more
        self._reading_ended = True
        self._wake.set()

    async def _read(self) -> None:
        while not self._ending:
            raw = await self._context.read()
            if raw is END_OF_STREAM or self._ending:
                return
            await self._take(raw)
            while self._window_full() and not self._ending:
                self._room.clear()
                await self._room.wait()

    @property
    def _ending(self) -> bool:
        return self._retired or self._closed

    def _window_full(self) -> bool:
        return (
            len(self._pending) >= self._options.stream_window_messages
            or self._pending_bytes >= self._options.stream_window_bytes
        )

    async def _take(self, raw: bytes) -> None:
        """Decodes and queues one message; whatever is wrong with it becomes its answer."""
        failed: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        request: Request | None = None
        sequence = 0
        try:
            message = parse_stream(raw)
            sequence = message.request.sequence
            if self._first is None:
                self._follow = message.follow
                self._first = _names_of(message.request)
                self._named = self._first.WhichOneof("version_choice") is not None
            request = to_request(message.request, len(raw))
            servable = self._route(request, self._first)
            await self._start(servable, request, request.signature or self._first.signature)
        except Exception as error:  # status_of logs what it does not know
            failed.set_exception(error)
            outputs = request.outputs if request is not None else ()
            self._append(_Pending(sequence, len(raw), outputs, None, failed))

    def _route(self, request: Request, first: pb.PredictRequest) -> Servable:
        if self._pinned is not None:
            self._check_pin(request, first, self._pinned)
            return self._pinned
        version, alias = request.version, request.alias
        if version is None and alias is None and request.model in ("", first.model):
            choice = first.WhichOneof("version_choice")
            version = first.version if choice == "version" else None
            alias = first.alias if choice == "alias" else None
        key = request.routing_key or first.routing_key
        servable = self._router.resolve(request.model or first.model, version=version, alias=alias, key=key)
        if not self._follow:
            self._pin(servable)
        return servable

    def _check_pin(self, request: Request, first: pb.PredictRequest, pinned: Servable) -> None:
        same = (
            request.model in ("", pinned.model)
            and request.version in (None, pinned.version)
            and request.alias in (None, first.alias or None)
        )
        if not same:
            raise InvalidCallError(
                f"this stream is on version {pinned.version} of {pinned.model!r}; open another stream for another"
            )

    def _pin(self, servable: Servable) -> None:
        servable.pin()
        self._pinned = servable
        self._unsubscribe.append(servable.retire_streams.subscribe(self._on_retired))

    async def _start(self, servable: Servable, request: Request, signature: str) -> None:
        servable.acquire()
        try:
            call = servable.prepare(signature, request.inputs, request.outputs, deadline_of(self._context))
            call.movable = self._follow and request.version is None and request.alias is None and not self._named
            await servable.room(call)
            if self._closed:
                call.future.cancel()
            servable.submit(call)
        except BaseException:
            servable.release()
            raise
        call.future.add_done_callback(lambda _: servable.release())
        self._append(_Pending(request.sequence, request.size, request.outputs, servable, call.future))

    def _append(self, pending: _Pending) -> None:
        self._pending.append(pending)
        self._pending_bytes += pending.size
        pending.result.add_done_callback(lambda _: self._on_answer(pending))
        self._wake.set()

    def _on_answer(self, pending: _Pending) -> None:
        """Counts an answer's bytes instead of its request's: what is held until the caller reads it."""
        result = pending.result
        if not result.cancelled() and result.exception() is None:
            size = sum(len(tensor.data) for tensor in result.result().outputs)
            self._pending_bytes += size - pending.size
            pending.size = size
        self._wake.set()

    async def _send(self, message: bytes) -> None:
        try:
            sent = self._context.send(message)
            if sent is not None:
                async with asyncio.timeout(self._options.stream_stall_s):
                    await sent
        except TimeoutError:
            stall_s = self._options.stream_stall_s
            raise StalledError(f"the stream's answers were not read for {stall_s:g} s", retry_after_s=0.0) from None
        except Exception as error:
            raise CallerGoneError("the caller is gone") from error

    async def _write(self) -> None:
        while True:
            while self._notices:
                await self._send(_noticed(self._notices.popleft()))
            if self._pending and self._pending[0].result.done():
                await self._write_answer()
                continue
            if not self._pending and self._retired:
                await self._write_retired()
                return
            if not self._pending and self._reading_ended:
                return
            self._wake.clear()
            await self._wake.wait()

    async def _write_answer(self) -> None:
        pending = self._pending[0]
        await self._send(_reply(pending, self._options.max_message_bytes))
        self._pending.popleft()
        self._pending_bytes -= pending.size
        self._room.set()

    async def _write_retired(self) -> None:
        assert self._pinned is not None
        notice = pb.StreamNotice(
            reason=pb.StreamNotice.REASON_VERSION_RETIRED,
            message=f"version {self._pinned.version} of {self._pinned.model!r} is retired",
            version=self._pinned.version,
        )
        await self._send(_noticed(notice))


def _names_of(message: pb.PredictRequest) -> pb.PredictRequest:
    """Returns a copy without the tensors: what the later messages of a stream may leave out."""
    names = pb.PredictRequest(model=message.model, signature=message.signature, routing_key=message.routing_key)
    choice = message.WhichOneof("version_choice")
    if choice == "version":
        names.version = message.version
    elif choice == "alias":
        names.alias = message.alias
    return names


def _noticed(notice: pb.StreamNotice) -> bytes:
    return pb.PredictStreamResponse(notice=notice).SerializeToString()


def _reply(pending: _Pending, max_bytes: int) -> bytes:
    """Returns the answer to a message, or the error that it came to."""
    servable, result = pending.servable, pending.result
    error = asyncio.CancelledError() if result.cancelled() else result.exception()
    if error is None and servable is not None:
        response = to_response(servable.model, result.result(), pending.outputs, pending.sequence)
        try:
            return packed(pb.PredictStreamResponse(response=response), max_bytes)
        except TooLargeError as too_large:
            error = too_large
    status = status_of(error or RuntimeError("an answer without a servable"))
    stream_error = pb.StreamError(
        sequence=pending.sequence,
        code=status.number,
        message=status.message,
        version=servable.version if servable is not None else 0,
        retry_after_ms=status.retry_after_ms,
    )
    return pb.PredictStreamResponse(error=stream_error).SerializeToString()
