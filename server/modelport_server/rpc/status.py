"""The one place where errors become gRPC statuses."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import NoReturn

import grpc
import grpc.aio

from modelport_registry import ConflictError, NotFoundError, RegistryError
from modelport_server import errors
from modelport_server.errors import CallerGoneError
from modelport_server.rpc._grpc import Context

_log = logging.getLogger(__name__)

_MESSAGE_BYTES = 1000

_CODES: dict[type[errors.ServeError], grpc.StatusCode] = {
    errors.InvalidCallError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownNameError: grpc.StatusCode.NOT_FOUND,
    errors.NotLoadedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NotAllowedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StalledError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.CallerGoneError: grpc.StatusCode.CANCELLED,
    errors.TooLargeError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotAvailableError: grpc.StatusCode.UNAVAILABLE,
    errors.EngineDiedError: grpc.StatusCode.UNAVAILABLE,
    errors.ExpiredError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.ModelFailureError: grpc.StatusCode.INTERNAL,
}


_REGISTRY_CODES: dict[type[RegistryError], grpc.StatusCode] = {
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    ConflictError: grpc.StatusCode.ABORTED,
}


CALL_CODES = (
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
)
"""What a call that has reached a version may fail with."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a caller is told."""

    code: grpc.StatusCode
    message: str
    retry_after_ms: int = 0

    @property
    def number(self) -> int:
        """The code as a number of google.rpc.Code."""
        return int(self.code.value[0])


def code_of(kind: type[BaseException], *, caller_fault: bool = False) -> grpc.StatusCode:
    """Returns the code for errors of a kind.

    Args:
        kind: their type; ``asyncio.CancelledError`` for callers that gave up.
        caller_fault: whether a model failed on what the caller had sent.
    """
    if caller_fault:
        return grpc.StatusCode.INVALID_ARGUMENT
    if issubclass(kind, asyncio.CancelledError):
        return grpc.StatusCode.CANCELLED
    return next((code for known, code in _CODES.items() if known is kind), grpc.StatusCode.INTERNAL)


def status_of(error: BaseException) -> Status:
    """Returns the status for ``error``; one that is not known is logged and answered with an id alone."""
    if isinstance(error, errors.ServeError) and type(error) in _CODES:
        fault = isinstance(error, errors.ModelFailureError) and error.caller_fault
        code = code_of(type(error), caller_fault=fault)
        retry_ms = max(1, round(error.retry_after_s * 1000)) if error.retry_after_s is not None else 0
        return Status(code, _cut(str(error)), retry_ms)
    if isinstance(error, RegistryError):
        return _registry_status(error)
    number = uuid.uuid4().hex[:12]
    _log.error("internal error %s", number, exc_info=error)
    return Status(grpc.StatusCode.INTERNAL, f"internal error {number}; the server's log says more")


def _registry_status(error: RegistryError) -> Status:
    cause = error.__cause__
    if isinstance(cause, OSError):  # its text names paths of this machine
        _log.warning("the registry failed: %s", error)
        reason = os.strerror(cause.errno) if cause.errno else type(cause).__name__
        return Status(grpc.StatusCode.INTERNAL, f"the server can't use its registry: {reason}; its log says more")
    code = _REGISTRY_CODES.get(type(error), grpc.StatusCode.FAILED_PRECONDITION)
    return Status(code, _cut(str(error)))


def _cut(text: str) -> str:
    return text.encode()[:_MESSAGE_BYTES].decode(errors="ignore")


def _metadata(status: Status) -> tuple[tuple[str, str], ...]:
    return (("grpc-retry-pushback-ms", str(status.retry_after_ms)),) if status.retry_after_ms else ()


async def guarded(context: Context, work: Awaitable[bytes | None]) -> bytes | None:
    """Returns what ``work`` comes to; an error of it ends the call with its status."""
    try:
        return await work
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except CallerGoneError as error:
        _log.debug("a caller went away: %s", error.__cause__)
        return None
    except Exception as error:  # status_of logs what it does not know
        await abort(context, error)


def fail(context: Context, error: BaseException) -> None:
    """Ends a call with the status for ``error``."""
    status = status_of(error)
    context.fail(status.code, status.message, _metadata(status))


async def abort(context: Context, error: BaseException) -> NoReturn:
    """Ends a call with the status for ``error``; raises, so it never returns."""
    status = status_of(error)
    await context.abort(status.code, status.message, trailing_metadata=_metadata(status))
    raise AssertionError("abort raises")
