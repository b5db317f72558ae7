"""Turns gRPC's statuses into our exceptions."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

import grpc
import grpc.aio

from modelport import exceptions as errors

_Code = grpc.StatusCode

ERROR_CLASSES = MappingProxyType(
    {
        _Code.CANCELLED: errors.CallCancelledError,
        _Code.UNKNOWN: errors.UnknownError,
        _Code.INVALID_ARGUMENT: errors.InvalidArgumentError,
        _Code.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
        _Code.NOT_FOUND: errors.NotFoundError,
        _Code.ALREADY_EXISTS: errors.AlreadyExistsError,
        _Code.PERMISSION_DENIED: errors.PermissionDeniedError,
        _Code.RESOURCE_EXHAUSTED: errors.ResourceExhaustedError,
        _Code.FAILED_PRECONDITION: errors.FailedPreconditionError,
        _Code.ABORTED: errors.AbortedError,
        _Code.OUT_OF_RANGE: errors.OutOfRangeError,
        _Code.UNIMPLEMENTED: errors.UnimplementedError,
        _Code.INTERNAL: errors.InternalError,
        _Code.UNAVAILABLE: errors.UnavailableError,
        _Code.DATA_LOSS: errors.DataLossError,
        _Code.UNAUTHENTICATED: errors.UnauthenticatedError,
    }
)
"""The exception of every status but OK."""

_CODES_BY_NUMBER = {code.value[0]: code for code in _Code}
_MAX_TEXT = 1000
_NO_CONNECTION = "there is no connection to it: is `modelport serve` running?"

Metadata = Iterable[tuple[str, str | bytes]]


def code_of_number(number: int) -> grpc.StatusCode:
    """Returns the status that a number of google.rpc.Code stands for; UNKNOWN for others and for OK."""
    code = _CODES_BY_NUMBER.get(number, _Code.UNKNOWN)
    return _Code.UNKNOWN if code is _Code.OK else code


def rpc_error(
    code: grpc.StatusCode, details: str | None, *, server: str, retry_after_s: float | None = None
) -> errors.RpcError:
    """Returns the exception for a status.

    Args:
        code: any status but OK; OK counts as UNKNOWN.
        details: the text that came with it.
        server: the address or addresses called, for the text.
        retry_after_s: what the server asked to wait, in seconds.
    """
    text = " ".join((details or "").split())[:_MAX_TEXT]
    cls = ERROR_CLASSES.get(code, errors.UnknownError)
    code = code if code in ERROR_CLASSES else _Code.UNKNOWN
    return cls(_message(code, text, server), code=code, details=text, retry_after_s=retry_after_s)


def _message(code: grpc.StatusCode, details: str, server: str) -> str:
    if code is _Code.UNAVAILABLE:
        return _unavailable(details, server)
    if code is _Code.DEADLINE_EXCEEDED:
        return f"{server} did not answer in time ({details or 'deadline exceeded'})"
    if "message larger than max" in details:
        return f"a message to or from {server} is over a limit ({details}): send fewer rows at a time, or raise it"
    return details or f"{server} answered {code.name}"


def _unavailable(details: str, server: str) -> str:
    if "Connection refused" in details or "No such file or directory" in details:
        return f"no server answers at {server} (connection refused); is `modelport serve` running?"
    if "ping timeout" in details or "keepalive" in details.lower():
        return f"the server at {server} gave no sign of life; it hangs, or the network is down"
    if "DNS" in details or "Name or service not known" in details or "Domain name not found" in details:
        return f"no address is known for {server}: {details}"
    if is_unreachable(code=_Code.UNAVAILABLE, details=details):
        return f"no server answers at {server}: {details}"
    return details or f"{server} is unavailable"


def is_unreachable(code: grpc.StatusCode, details: str) -> bool:
    """Returns whether a status says that no connection could be made at all."""
    said = ("failed to connect", "connection attempt", "all backends failing", "dns resolution")
    return code is _Code.UNAVAILABLE and any(text in details.lower() for text in said)


def pushback_s(metadata: Metadata | None) -> float | None:
    """Returns how long the server asks to wait before another attempt, in seconds.

    None where it says nothing, or that there shall be none.
    """
    for key, value in metadata or ():
        if key == "grpc-retry-pushback-ms":
            try:
                wait_ms = int(value)
            except ValueError:
                return None
            return wait_ms / 1000 if wait_ms >= 0 else None
    return None


def from_aio(error: grpc.aio.AioRpcError, server: str, *, connected: bool = True) -> errors.RpcError:
    """Returns our exception for gRPC's; ``connected`` is whether there is a connection to the server."""
    late = error.code() is _Code.DEADLINE_EXCEEDED
    return rpc_error(
        error.code(),
        _NO_CONNECTION if late and not connected else error.details(),
        server=server,
        retry_after_s=pushback_s(error.trailing_metadata()),  # type: ignore[arg-type]
    )
