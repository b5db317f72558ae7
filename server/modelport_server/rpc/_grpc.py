"""What the handlers need of ``grpc.aio``, typed: the published type stubs lack part of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from time import monotonic
from types import MappingProxyType
from typing import Any, Protocol

import grpc
import grpc.aio

_aio: Any = grpc.aio
END_OF_STREAM: object = _aio.EOF
"""What ``Context.read`` returns when the caller has closed its side."""


class Context(Protocol):
    """A call, as ``grpc.aio`` hands it to a handler."""

    async def read(self) -> Any:
        """Returns the next message, or ``END_OF_STREAM``."""
        ...

    async def write(self, message: bytes) -> None:
        """Sends a message."""
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
    """Returns a handler of raw bytes for methods that are unary, stream both ways, or stream answers alone."""
    api: Any = grpc
    methods = {name: api.unary_unary_rpc_method_handler(method) for name, method in unary.items()}
    methods |= {name: api.stream_stream_rpc_method_handler(method) for name, method in streams.items()}
    methods |= {name: api.unary_stream_rpc_method_handler(method) for name, method in answer_streams.items()}
    return api.method_handlers_generic_handler(service, methods)


def new_server(options: list[tuple[str, int]], max_concurrent_calls: int) -> Any:
    """Returns a ``grpc.aio.Server``."""
    return _aio.server(options=options, maximum_concurrent_rpcs=max_concurrent_calls)
