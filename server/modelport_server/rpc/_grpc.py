"""What the handlers need of gRPC, typed: the published type stubs lack part of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from time import monotonic
from types import MappingProxyType
from typing import Any, Protocol

import grpc

from modelport_server.http2.call import END_OF_STREAM as END_OF_STREAM


class Context(Protocol):
    """A call, as the server hands it to a handler."""

    async def read(self) -> Any:
        """Returns the next message, or ``END_OF_STREAM``."""
        ...

    def send(self, message: bytes) -> asyncio.Future[None] | None:
        """Sends a message; returns what is done once it is on its way, or None if it is already.

        Raises:
            CallEndedError: if the call has ended; what is returned raises it, too.
        """
        ...

    def answer(self, message: bytes) -> None:
        """Sends the only message and ends the call well, if it has not ended."""
        ...

    def fail(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        """Ends the call with a status, if it has not ended."""
        ...

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> Any:
        """Ends the call with a status; never returns."""
        ...

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Has ``callback`` called once the call has ended, its answer sent."""
        ...

    def peer(self) -> str:
        """Returns who calls, as gRPC names it: ``ipv4:ADDRESS:PORT``, ``ipv6:[ADDRESS]:PORT`` or ``unix:``."""
        ...

    def time_remaining(self) -> float | None:
        """Returns the seconds until the call's deadline; None if it has none."""
        ...


def deadline_of(context: Context) -> float:
    """Returns when a call expires, on the monotonic clock; infinity if it does not."""
    remaining_s = context.time_remaining()
    return math.inf if remaining_s is None else monotonic() + remaining_s


def generic_handler(
    service: str,
    *,
    unary: Mapping[str, Any],
    streams: Mapping[str, Any] = MappingProxyType({}),
    answer_streams: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Returns a handler of raw bytes for methods that are unary, stream both ways, or stream answers alone.

    A unary method that is no coroutine function ends its call by ``Context.answer`` or ``Context.fail``, now or later.
    """
    api: Any = grpc
    methods = {name: api.unary_unary_rpc_method_handler(method) for name, method in unary.items()}
    methods |= {name: api.stream_stream_rpc_method_handler(method) for name, method in streams.items()}
    methods |= {name: api.unary_stream_rpc_method_handler(method) for name, method in answer_streams.items()}
    return api.method_handlers_generic_handler(service, methods)
