"""Files and folders: read within bounds, written through to the disk, locked."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from modelport.names import shown
from modelport_registry._errors import RegistryError
from modelport_registry._manifest import FileEntry, check_relative_path

CHUNK_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_FILES = 100_000

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Found:
    """Something that lies in a folder, itself a plain file or a folder."""

    path: str
    """Relative, parts joined by ``/``."""
    is_folder: bool
    """Whether it is a folder."""
    size: int
    """Bytes of a file."""
    links: int
    """The names that a file has."""


def walk(folder: Path, error: type[RegistryError]) -> Iterator[Found]:
    """Yields everything below ``folder``, a folder before what is in it, sorted by name.

    Raises:
        error: at links, special files, names that are no text, and more than bounds allow.
    """
    for count, found in enumerate(_walk(folder, "", error), start=1):
        if count > MAX_FILES:
            raise error(f"{shown(folder.name)} holds more than {MAX_FILES} files")
        yield found


def _walk(folder: Path, prefix: str, error: type[RegistryError]) -> Iterator[Found]:
    if prefix.count("/") > MAX_DEPTH:
        raise error(f"folders are nested more than {MAX_DEPTH} deep")
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        path = prefix + entry.name
        status = entry.stat(follow_symlinks=False)
        _check_plain(path, status.st_mode, error)
        is_folder = stat.S_ISDIR(status.st_mode)
        yield Found(path, is_folder, 0 if is_folder else status.st_size, status.st_nlink)
        if is_folder:
            yield from _walk(Path(entry.path), path + "/", error)


def _check_plain(path: str, mode: int, error: type[RegistryError]) -> None:
    if not check_relative_path(path):
        raise error(f"{shown(path)} is not a usable file name")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise error(f"{shown(path)} is {_kind(mode)}: only plain files and folders are allowed")


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"


@contextlib.contextmanager
def opened(path: Path, error: type[RegistryError]) -> Generator[int]:
    """Yields a descriptor to read the plain file ``path``; never follows a link or waits for a FIFO.

    Raises:
        error: if it is not a plain file.
    """
    status = path.lstat()
    if stat.S_ISREG(status.st_mode):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                yield descriptor
                return
        finally:
            os.close(descriptor)
    raise error(f"{shown(path.name)} is not a plain file")


def read_bounded(path: Path, limit_bytes: int, error: type[RegistryError]) -> bytes:
    """Returns what the plain file ``path`` holds.

    Raises:
        error: if it is not a plain file, or has more than ``limit_bytes``.
    """
    with opened(path, error) as descriptor:
        parts: list[bytes] = []
        left = limit_bytes + 1
        while left > 0 and (part := os.read(descriptor, min(left, CHUNK_BYTES))):
            parts.append(part)
            left -= len(part)
    if left <= 0:
        raise error(f"{shown(path.name)} has more than {limit_bytes} bytes")
    return b"".join(parts)


def read_tail(path: Path, limit_bytes: int, error: type[RegistryError]) -> bytes:
    """Returns the last ``limit_bytes`` that the plain file ``path`` holds; nothing where there is no file.

    Raises:
        error: if it is not a plain file.
    """
    try:
        with opened(path, error) as descriptor:
            size = os.fstat(descriptor).st_size
            os.lseek(descriptor, max(0, size - limit_bytes), os.SEEK_SET)
            return b"".join(chunks(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return b""


def chunks(descriptor: int) -> Iterator[bytes]:
    """Yields what is left to read."""
    while part := os.read(descriptor, CHUNK_BYTES):
        yield part


def sha256_of(path: Path, error: type[RegistryError]) -> tuple[int, str]:
    """Returns size and SHA-256 of the plain file ``path``."""
    digest, size = hashlib.sha256(), 0
    with opened(path, error) as descriptor:
        for part in chunks(descriptor):
            digest.update(part)
            size += len(part)
    return size, digest.hexdigest()


def write_all(descriptor: int, data: bytes) -> None:
    """Writes ``data`` whole, however little each call takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_file(path: Path, data: bytes) -> None:
    """Makes the new file ``path``, through to the disk."""
    descriptor = os.open(path, _CREATE | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, temporary: Path, data: bytes) -> None:
    """Makes ``path`` hold ``data``, in one step that a crash cannot divide.

    ``temporary`` lies in the same folder, and nobody else writes it: the caller holds a lock.
    """
    temporary.unlink(missing_ok=True)
    write_file(temporary, data)
    temporary.replace(path)
    fsync_folder(path.parent)


def copy_file(
    source: Path, target: Path, name: str, error: type[RegistryError], on_bytes: Callable[[int], None]
) -> FileEntry:
    """Copies a plain file through to the disk, and returns its entry, hashed on the way."""
    digest, size = hashlib.sha256(), 0
    with opened(source, error) as reader:
        writer = os.open(target, _CREATE | os.O_EXCL, 0o666)
        try:
            for part in chunks(reader):
                digest.update(part)
                write_all(writer, part)
                size += len(part)
                on_bytes(len(part))
            os.fsync(writer)
        finally:
            os.close(writer)
    return FileEntry(name, size, digest.hexdigest())


def fsync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Makes ``folder`` and what is missing above it, through to the disk."""
    missing: list[Path] = []
    while not folder.is_dir():
        missing.append(folder)
        if folder == folder.parent:
            break
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def open_lock(path: Path) -> int:
    """Returns a descriptor of the lock file ``path``, which is made where it is missing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    """Holds the lock file ``path`` alone; waits for it. The kernel lets go when the process dies."""
    descriptor = open_lock(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # A process forked meanwhile shares the descriptor: closing ours alone would not let go.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def try_lock(path: Path) -> int | None:
    """Returns a descriptor that holds ``path`` alone, or None if someone else holds it."""
    descriptor = open_lock(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
