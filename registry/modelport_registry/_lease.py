"""Leases: a reader's promise from the registry that a version stays while it is read."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Generator
from pathlib import Path

from modelport_registry._errors import NotFoundError
from modelport_registry._folder import ModelFolder

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def lease(folder: ModelFolder, version: int) -> Generator[None]:
    """Holds a version: while it is held, garbage collection leaves it alone.

    The lock lies beside the version, not in it: versions never change. Whoever may not write to the
    registry uses the lock file that publishing made; where even that is missing, nothing is locked.

    Raises:
        NotFoundError: if there is no such version.
    """
    if not folder.has(version):
        raise NotFoundError(f"{folder.model} has no version {version}")
    with contextlib.ExitStack() as stack:
        lock = _hold(folder.leases / str(version))
        if lock is not None:
            stack.callback(os.close, lock)
            # A process forked meanwhile shares the descriptor: closing ours alone would not let go.
            stack.callback(fcntl.flock, lock, fcntl.LOCK_UN)
        if not folder.has(version):  # collected while we waited for the lock
            raise NotFoundError(f"{folder.model} has no version {version}")
        yield


def _hold(path: Path) -> int | None:
    while True:
        descriptor = _open(path)
        if descriptor is None:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        # Garbage collection removes lock files: a lock on one that has no name any more is none.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _open(path: Path) -> int | None:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        path.parent.mkdir(exist_ok=True)
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as exc:
        if exc.errno not in _READ_ONLY:
            raise
    try:
        return os.open(path, flags | os.O_RDONLY)
    except FileNotFoundError:
        return None
