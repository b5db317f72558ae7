"""Errors that modelport raises: the text of each is one line for people.

    ModelportError
    |-- InputError                       what was given can't be sent; found before anything is sent
    |-- StreamInterruptedError           a stream broke and could not be resumed in time
    |-- ClientClosedError                the client was closed
    |-- RolloutError                     a version that was waited for does not come into service
    |   |-- VersionRejectedError         a gate, the evidence or a person rejected it
    |   `-- RolloutTimeoutError          that was not settled in time
    `-- RpcError                         a server, or gRPC on its behalf, answered with an error
        |-- CallCancelledError           CANCELLED
        |-- UnknownError                 UNKNOWN
        |-- InvalidArgumentError         INVALID_ARGUMENT     the request is wrong
        |-- DeadlineExceededError        DEADLINE_EXCEEDED    no answer in time
        |-- NotFoundError                NOT_FOUND            no such model or version
        |-- AlreadyExistsError           ALREADY_EXISTS
        |-- PermissionDeniedError        PERMISSION_DENIED    this caller may not
        |-- ResourceExhaustedError       RESOURCE_EXHAUSTED   the server is full, or a message too large
        |-- FailedPreconditionError      FAILED_PRECONDITION  it exists, but is not loaded
        |   `-- VersionRetiredError      the version that a stream was pinned to is gone
        |-- AbortedError                 ABORTED
        |-- OutOfRangeError              OUT_OF_RANGE
        |-- UnimplementedError           UNIMPLEMENTED        the server does not know the call
        |-- InternalError                INTERNAL             the server is at fault
        |-- UnavailableError             UNAVAILABLE          nobody can answer at the moment
        |-- DataLossError                DATA_LOSS
        `-- UnauthenticatedError         UNAUTHENTICATED      no valid credentials

The registry, the server and the trainer have errors of their own below ``ModelportError``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc


class ModelportError(Exception):
    """Anything that went wrong in a way that modelport knows: its text is one line for people."""


class InputError(ModelportError, ValueError):
    """What was given can't be sent: a wrong type, values that do not fit, a missing input."""


class ClientClosedError(ModelportError):
    """The client was closed before or while it was used."""


class StreamInterruptedError(ModelportError):
    """A stream broke and could not be resumed in time.

    Every batch below ``answered`` has been answered and given to the caller; the cause is the error
    that broke the connection.

    Args:
        message: what happened, for people.
        answered: how many batches were answered, counted from the first one.
        unanswered: the indices of the batches that were taken from the caller and not answered.
    """

    def __init__(self, message: str, *, answered: int, unanswered: tuple[int, ...]) -> None:
        super().__init__(message)
        self.answered = answered
        self.unanswered = unanswered


class RolloutError(ModelportError):
    """A version that was waited for does not come into service, as things stand."""


_AFTER_THE_GATES = {"bake": "was rolled back", "rollback": "was rolled back", "crash": "was rejected as it crashed"}


class VersionRejectedError(RolloutError):
    """A version was rejected; it is not tried again unless somebody approves it.

    Args:
        model: the model's name.
        version: the version's number.
        gate: the gate that it failed; ``bake`` or ``rollback`` for what came after them, ``crash`` for an engine
            that failed.
        reason: what was found.
    """

    def __init__(self, model: str, version: int, *, gate: str, reason: str) -> None:
        what = _AFTER_THE_GATES.get(gate, f"was rejected at the gate {gate}")
        super().__init__(f"{model} version {version} {what}: {reason or 'no reason was given'}")
        self.model = model
        self.version = version
        self.gate = gate
        self.reason = reason


class RolloutTimeoutError(RolloutError, TimeoutError):
    """Whether a version comes into service was not settled in time."""


class RpcError(ModelportError):
    """A server, or gRPC on its behalf, answered with an error.

    Args:
        message: what happened, for people.
        code: the status.
        details: the text that came with the status.
        retry_after_s: how long the server asked to wait before trying again, in seconds; None where
            it said nothing, or that trying again is of no use.
    """

    def __init__(
        self, message: str, *, code: grpc.StatusCode, details: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.details = details
        self.retry_after_s = retry_after_s


class CallCancelledError(RpcError):
    """The call was cancelled by somebody else than its caller, as a rule by a stopping server."""


class UnknownError(RpcError):
    """The other side failed without saying how."""


class InvalidArgumentError(RpcError):
    """The request is wrong: a name, a dtype, a shape, a signature."""


class DeadlineExceededError(RpcError):
    """No answer came in time."""


class NotFoundError(RpcError):
    """There is no such model or version."""


class AlreadyExistsError(RpcError):
    """What was to be made exists already."""


class PermissionDeniedError(RpcError):
    """This caller may not do this."""


class ResourceExhaustedError(RpcError):
    """The server is full, or the message is larger than a limit."""


class FailedPreconditionError(RpcError):
    """What is asked for can't be done as things are: the version is not loaded, or the rollout does not allow it."""


class VersionRetiredError(FailedPreconditionError):
    """The version that a stream was pinned to by its caller is not served any more."""


class AbortedError(RpcError):
    """Somebody else changed the state first, or the server gave the call up: look again, and try again."""


class OutOfRangeError(RpcError):
    """Something was asked for beyond its end."""


class UnimplementedError(RpcError):
    """The server does not know this call."""


class InternalError(RpcError):
    """The server is at fault; its log says more."""


class UnavailableError(RpcError):
    """Nobody can answer at the moment: no server, a stopping one, or one that has nothing loaded."""


class DataLossError(RpcError):
    """Data was lost or damaged."""


class UnauthenticatedError(RpcError):
    """The call carries no valid credentials."""
