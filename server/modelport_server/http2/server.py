"""A gRPC server: listens, finds the method of a call, and runs its handler. Takes what ``grpc.aio.Server`` takes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import logging
import socket
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio

from modelport_server.http2 import frames
from modelport_server.http2.call import END_OF_STREAM, ServerCall
from modelport_server.http2.connection import Connection
from modelport_server.http2.headers import RequestHead
from modelport_server.options import split_host_port

_log = logging.getLogger(__name__)
_aio: Any = grpc.aio

_BACKLOG = 1024
_LAST_CALLS_S = 0.25
"""How long peers may take to hear that they shall make no more calls here."""
_OTHERS_STALL_S = 5.0
"""How long answers may wait that are small, and while which the health service has everybody else wait."""
_CLOSING_S = 0.5
"""How long they may take to read what is left for them when the server ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a server."""

    max_message_bytes: int = 4 * 1024 * 1024
    """The largest message that is taken."""
    max_concurrent_calls: int = 4096
    """The most calls at once; more get RESOURCE_EXHAUSTED."""
    max_streams_per_connection: int = 1024
    """The most calls at once on one connection; its peer makes others wait."""
    stall_s: float = 60.0
    """How long an answer may wait for its caller to read, in seconds."""
    keepalive_s: float = 10.0
    """After how long a silent peer is asked whether it is there, in seconds."""
    keepalive_timeout_s: float = 5.0
    """How long it may take to say so, in seconds."""
    reuse_port: bool = False
    """Whether several servers may share a port."""
    endless: frozenset[str] = frozenset()
    """Methods whose calls end when their callers want, such as ``/grpc.health.v1.Health/Watch``: ``GrpcServer.stop``
    does not wait for them."""


class _Details(NamedTuple):
    """What a generic handler of ``grpc`` is asked with."""

    method: str
    invocation_metadata: tuple[()] = ()


class GrpcServer:
    """Answers gRPC calls on asyncio's event loop.

    Args:
        limits: its bounds.
    """

    def __init__(self, limits: Limits) -> None:
        self.keepalive_s = limits.keepalive_s
        self.keepalive_timeout_s = limits.keepalive_timeout_s
        self.max_streams = limits.max_streams_per_connection
        self.max_message_bytes = limits.max_message_bytes
        self.stall_s = limits.stall_s
        self._limits = limits
        self._handlers: list[Any] = []
        self._methods: dict[str, tuple[Any, bool]] = {}
        """By path: how it is handled, and whether its handler ends calls by itself, without a task."""
        self._socket: tuple[Path, int] | None = None
        """The path of a Unix socket, and which file that was."""
        self._servers: list[asyncio.AbstractServer] = []
        self._connections: dict[Connection, None] = {}
        self._calls: dict[ServerCall, bool] = {}
        """Whether ``stop`` waits for it, by call."""
        self.ended: dict[tuple[str, grpc.StatusCode], int] = {}
        """How many calls have ended, by method and by what their callers were told; methods that there are not have an
        empty name."""
        self._awaited = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        """Adds services, as ``grpc.method_handlers_generic_handler`` makes them."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Does nothing: generated code says so what it says by ``add_generic_rpc_handlers``, too."""

    async def start(self, address: str) -> int:
        """Listens at ``HOST:PORT`` or ``unix:PATH`` and returns the port; 0 for a path.

        Raises:
            OSError: if it can't listen there.
        """
        try:
            return await self._listen(address)
        except BaseException:
            for server in self._servers:
                server.close()
            raise

    async def _listen(self, address: str) -> int:
        loop = asyncio.get_running_loop()
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            self._servers.append(await loop.create_unix_server(self._connection, path, backlog=_BACKLOG))
            self._note_socket(path)
            return 0
        host, port = split_host_port(address)
        places = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        missing: OSError | None = None
        for family, place in dict.fromkeys((family, place) for family, _, _, _, place in places):
            try:
                listener = self._listener(family, (place[0], port, *place[2:]))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error  # a name may have an address of a kind that this machine does not have
                continue
            port = listener.getsockname()[1]  # the same for all
            self._servers.append(await loop.create_server(self._connection, sock=listener, backlog=_BACKLOG))
        if missing is not None and not self._servers:
            raise missing
        return port

    def _note_socket(self, path: Path) -> None:
        self._socket = path, path.stat().st_ino

    def _listener(self, family: int, place: Any) -> socket.socket:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._limits.reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                any_address = place[0] == "::"  # takes IPv4, too, as gRPC has it
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not any_address))
            listener.bind(place)
        except BaseException:
            listener.close()
            raise
        return listener

    def _connection(self) -> Connection:
        return Connection(self)

    @property
    def connections(self) -> tuple[Connection, ...]:
        """Those that there are."""
        return tuple(self._connections)

    @property
    def calls_under_way(self) -> int:
        """How many calls have a handler that has not ended, or an answer that is not sent."""
        return len(self._calls)

    def add(self, connection: Connection) -> None:
        """Takes note of a connection."""
        self._connections[connection] = None

    def discard(self, connection: Connection) -> None:
        """Takes note that it is gone."""
        self._connections.pop(connection, None)

    def drain(self) -> None:
        """Takes no more connections, and has peers open no more calls; those that are on their way are answered."""
        for server in self._servers:
            server.close()
        for connection in self.connections:
            connection.drain()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Ends all calls, as ``finish``, and closes all connections."""
        await self.finish(grace_s)
        await self.close()

    async def finish(self, grace_s: float = 0.0) -> None:
        """Drains, and waits for calls.

        Args:
            grace_s: how long they may take to end, in seconds; those that take longer get UNAVAILABLE.
        """
        self.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                heard = [connection.refusing for connection in self.connections]
                if heard:
                    await asyncio.wait(heard, timeout=_LAST_CALLS_S)
                await self._idle.wait()
        for call in list(self._calls):
            call.fail(grpc.StatusCode.UNAVAILABLE, "the server is stopping")

    async def close(self) -> None:
        """Closes all connections, once their peers have read what is left for them."""
        closed = [connection.closed for connection in self.connections]
        for connection in self.connections:
            connection.end(frames.NO_ERROR, "")
        if closed:
            await asyncio.wait(closed, timeout=_CLOSING_S)
        for connection in self.connections:
            connection.abort()
        self._remove_socket()

    def _remove_socket(self) -> None:
        """Removes a Unix socket's file, unless another server has put its own there; Python before 3.13 leaves it."""
        if self._socket is not None:
            path, number = self._socket
            with contextlib.suppress(OSError):
                if path.stat().st_ino == number:
                    path.unlink()

    # What calls come to.

    def begin(self, call: ServerCall, head: RequestHead) -> None:
        """Begins a call."""
        code = grpc.StatusCode
        if head.http_status != 200:
            call.refuse(head.http_status)
            return
        method, taskless = self._methods.get(head.path) or self._find(head.path)
        call.method = head.path if method is not None else ""
        call.add_done_callback(self._count)
        if head.too_large:
            call.fail(code.RESOURCE_EXHAUSTED, "the headers are too large")
        elif method is None:
            call.fail(code.UNIMPLEMENTED, "Method not found!")
        elif head.malformed:
            call.fail(code.INVALID_ARGUMENT, head.malformed)
        elif head.encoding != "identity":
            accepted = (("grpc-accept-encoding", "identity"),)
            call.fail(code.UNIMPLEMENTED, "messages must not be compressed", accepted)
        elif len(self._calls) >= self._limits.max_concurrent_calls:
            call.fail(code.RESOURCE_EXHAUSTED, f"{len(self._calls)} calls are under way, which is the most")
        else:
            self._calls[call] = awaited = head.path not in self._limits.endless
            if awaited:
                self._awaited += 1
                self._idle.clear()
            call.add_done_callback(self._on_end)
            if head.timeout_s is not None:
                call.expire_in(head.timeout_s)
            if method.request_streaming:
                self._run(call, method, _requests(call, method.request_deserializer))
            else:
                call.when_complete(partial(self._begin_unary, method, taskless))

    def _find(self, path: str) -> tuple[Any, bool]:
        details = _Details(path)
        for handler in self._handlers:
            if (method := handler.service(details)) is not None:
                taskless = method.unary_unary is not None and not inspect.iscoroutinefunction(method.unary_unary)
                self._methods[path] = method, taskless
                return self._methods[path]
        return None, False

    def _count(self, call: ServerCall) -> None:
        key = call.method, call.code
        self.ended[key] = self.ended.get(key, 0) + 1

    def _on_end(self, call: ServerCall) -> None:
        if call.task is None or call.task.done():
            self._let_go(call)
        else:
            call.task.add_done_callback(lambda _: self._let_go(call))

    def _let_go(self, call: ServerCall) -> None:
        self._awaited -= self._calls.pop(call)
        if not self._awaited:
            self._idle.set()

    def _begin_unary(self, method: Any, taskless: bool, call: ServerCall) -> None:
        messages = call.take_all()
        if len(messages) != 1:
            call.fail(grpc.StatusCode.INTERNAL, f"the call has {len(messages)} messages; one is wanted")
            return
        request: Any = messages[0]
        if method.request_deserializer is not None:
            try:
                request = method.request_deserializer(request)
            except Exception:
                call.fail(grpc.StatusCode.INVALID_ARGUMENT, "the message can't be read")
                return
        if taskless:
            try:
                method.unary_unary(request, call)
            except Exception:
                self._on_error(call)
        else:
            self._run(call, method, request)

    def _run(self, call: ServerCall, method: Any, request: Any) -> None:
        call.task = asyncio.get_running_loop().create_task(self._handle(call, method, request))

    async def _handle(self, call: ServerCall, method: Any, request: Any) -> None:
        """Has a call handled, and ends it as that does."""
        try:
            if method.response_streaming:
                await self._stream(call, method, request)
            else:
                await self._answer(call, method, request)
        except _aio.AbortError:
            pass  # it has its status
        except asyncio.CancelledError:
            call.fail(grpc.StatusCode.CANCELLED, "the call was cancelled")
        except Exception:
            self._on_error(call)

    def _on_error(self, call: ServerCall) -> None:
        if not call.ended:
            _log.exception("a handler failed")
            call.fail(grpc.StatusCode.INTERNAL, "internal error; the server's log says more")

    async def _answer(self, call: ServerCall, method: Any, request: Any) -> None:
        handler = method.stream_unary if method.request_streaming else method.unary_unary
        response = await handler(request, call)
        if response is None:
            call.fail(grpc.StatusCode.CANCELLED, "the call was given up")
        else:
            call.answer(_serialized(method, response))

    async def _stream(self, call: ServerCall, method: Any, request: Any) -> None:
        handler = method.stream_stream if method.request_streaming else method.unary_stream
        context: Any = call if method.response_serializer is None else _Serializing(call, method)
        answers = handler(request, context)
        if inspect.isasyncgen(answers):
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    await context.write(answer)
        else:
            await answers
        call.end()


class _Serializing:
    """A call whose handler writes messages and not bytes."""

    def __init__(self, call: ServerCall, method: Any) -> None:
        self._call = call
        self._method = method

    async def write(self, message: Any) -> None:
        """Sends a message."""
        await self._call.write(_serialized(self._method, message), stall_s=_OTHERS_STALL_S)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


def _serialized(method: Any, message: Any) -> bytes:
    data: bytes = message if method.response_serializer is None else method.response_serializer(message)
    return data


async def _requests(call: ServerCall, deserialize: Any) -> AsyncIterator[Any]:
    """Yields what a call's caller sends; ends a call with a message that can't be read."""
    while (message := await call.read()) is not END_OF_STREAM:
        try:
            request = message if deserialize is None else deserialize(message)
        except Exception:
            call.fail(grpc.StatusCode.INVALID_ARGUMENT, "a message can't be read")
            return
        yield request
