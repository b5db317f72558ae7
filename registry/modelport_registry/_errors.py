"""What the registry raises.

ModelportError
└── RegistryError           storage that fails, and mistakes in what was asked for
    ├── NotFoundError       no such model, version or alias
    ├── AlreadyExistsError  the version number is taken, or was once
    ├── ConflictError       someone else changed the state in between
    ├── IntegrityError      something on disk is not what was published
    └── InvalidModelError   the folder or the examples that were to be published are not usable
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Generator

from modelport.exceptions import ModelportError


class RegistryError(ModelportError):
    """The registry cannot do what was asked: its text is one line for people."""


class NotFoundError(RegistryError):
    """There is no such model, version or alias."""


class AlreadyExistsError(RegistryError):
    """The version number is taken, or belonged to a version that was collected."""


class ConflictError(RegistryError):
    """The state has another generation than the caller had seen."""


class IntegrityError(RegistryError):
    """What is on disk is damaged, incomplete or of a newer format."""


class InvalidModelError(RegistryError):
    """What was to be published cannot be: not a SavedModel, or examples that do not fit it."""


_HINTS = {
    errno.ENOSPC: "free some space and try again",
    errno.EDQUOT: "free some space and try again",
    errno.EACCES: "check the folder's owner and mode",
    errno.EPERM: "check the folder's owner and mode",
    errno.EROFS: "mount the registry writable",
}


@contextlib.contextmanager
def storage_errors(doing: str) -> Generator[None]:
    """Turns what the operating system refuses into a ``RegistryError`` of one line.

    Raises:
        RegistryError: instead of any ``OSError``; ``doing`` opens its text.
    """
    try:
        yield
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno else str(exc) or type(exc).__name__
        where = f" ({os.fsdecode(exc.filename)!a})" if isinstance(exc.filename, str | bytes) else ""
        hint = f"; {_HINTS[exc.errno]}" if exc.errno in _HINTS else ""
        raise RegistryError(f"{doing}: {reason}{where}{hint}") from exc
