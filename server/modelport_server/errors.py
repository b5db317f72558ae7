"""What can go wrong with a call, in the server's own words; ``rpc`` maps it to gRPC statuses.

ServeError
|-- InvalidCallError      the request is wrong; sending it again is of no use
|-- UnknownNameError      no such model or version
|-- NotLoadedError        it exists, but is not loaded
|-- NotAllowedError       this server lets nobody do that
|-- OverloadedError       the queue is full
|-- TooLargeError         the answer does not fit into a message
|-- StalledError          the caller does not read its answers
|-- CallerGoneError       nobody is left to answer
|-- NotAvailableError     nothing can answer at the moment
|-- NotCopiedError        a copy of a call can't be run, whatever the call was like
|-- ExpiredError          the deadline passed before the call ran
`-- ModelFailureError     the model itself failed
"""

from __future__ import annotations

from collections.abc import Iterable

from modelport.exceptions import ModelportError

_MAX_NAMED = 8


class ServeError(ModelportError):
    """A call that can't be answered."""

    retry_after_s: float | None = None
    """How long a caller had better wait before it tries again, in seconds; None: not worth it."""


class InvalidCallError(ServeError):
    """The request is wrong, whoever answers it."""


class UnknownNameError(ServeError):
    """The request names a model or a version that does not exist."""

    @classmethod
    def of_model(cls, model: str, served: Iterable[str]) -> UnknownNameError:
        """Returns what to say of a model that is not among those that are served."""
        names = sorted(served)
        known = ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
        return cls(f"no model {model!r} is served here; " + (f"served are {known}" if names else "there is none yet"))


class NotLoadedError(ServeError):
    """The request names something that exists and is not loaded."""


class NotAllowedError(ServeError):
    """This server lets nobody do what the request asks for."""


class OverloadedError(ServeError):
    """The queue is full."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLargeError(ServeError):
    """The answer does not fit into a message."""


class StalledError(OverloadedError):
    """The caller of a stream does not read its answers."""


class CallerGoneError(ServeError):
    """The call has ended on the caller's side."""


class NotAvailableError(ServeError):
    """Nothing can answer at the moment: the engine died, or the server is stopping."""

    def __init__(self, message: str, *, retry_after_s: float = 0.1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotCopiedError(ServeError):
    """A copy of a call can't be run: that says nothing about the version, and no caller hears of it."""


class ExpiredError(ServeError):
    """The call's deadline passed before it was run."""


class ModelFailureError(ServeError):
    """The model failed on these inputs.

    Args:
        message: what the model said, fit for callers.
        caller_fault: whether the model blamed its inputs, as TensorFlow's INVALID_ARGUMENT does.
    """

    def __init__(self, message: str, *, caller_fault: bool = False) -> None:
        super().__init__(message)
        self.caller_fault = caller_fault


class EngineDiedError(NotAvailableError):
    """The engine process ended while the call was in it."""


class StartError(ModelportError):
    """The server can't start; the text says why."""


def cannot_listen(address: str, error: OSError | UnicodeError, option: str) -> str:
    """Returns why a server can't listen at an address, for people, and which option gives another one."""
    why = error.strerror or str(error) if isinstance(error, OSError) else "it is not a host's name"
    return f"can't listen on {address}: {why}; choose another with {option} HOST:PORT"
