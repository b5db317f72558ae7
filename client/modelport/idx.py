"""Reads IDX files, the format of MNIST and its kin, gzip'd or not, a bounded piece at a time."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from modelport.exceptions import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_EXPANSION = 1100
"""What deflate gains at most, rounded up: a longer promise is none that memory should be set aside for."""
_SKIP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class IdxHeader:
    """What an IDX file says about itself."""

    dtype: np.dtype[Any]
    """The type of the elements, big-endian as in the file."""
    shape: tuple[int, ...]
    """The size of each dimension, rows first."""
    byte_count: int
    """The length of the header itself."""

    @property
    def row_bytes(self) -> int:
        """The bytes that a row takes."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def read_header(path: str | Path) -> IdxHeader:
    """Returns the header of the IDX file at ``path``.

    Raises:
        InputError: if it is no IDX file, or can't be read.
    """
    path = Path(path)
    try:
        with _opened(path) as file:
            header = _header(file, path)
        _check_length(path, header)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    return header


def read_idx(path: str | Path, start: int = 0, stop: int | None = None) -> Array:
    """Returns the rows ``start`` to ``stop`` of the IDX file at ``path``, in the machine's byte order.

    Only these rows are held in memory; of a gzip'd file those before them are read and dropped.

    Args:
        path: the file.
        start: the first row.
        stop: the row behind the last one; None for the end. Rows beyond the end do not count.

    Raises:
        InputError: if it is no IDX file, is too short, or can't be read.
    """
    header = read_header(path)
    stop = header.shape[0] if stop is None else min(stop, header.shape[0])
    start = min(max(start, 0), stop)
    pieces = list(idx_chunks(path, max(1, stop - start), start=start, stop=stop))
    return pieces[0] if pieces else np.empty((0, *header.shape[1:]), header.dtype.newbyteorder("="))


def idx_chunks(path: str | Path, rows: int, *, start: int = 0, stop: int | None = None) -> Generator[Array, None, None]:
    """Yields the rows of the IDX file at ``path``, at most ``rows`` at a time.

    Raises:
        InputError: as ``read_idx`` does.
    """
    path = Path(path)
    header = read_header(path)
    stop = header.shape[0] if stop is None else min(stop, header.shape[0])
    try:
        with _opened(path) as file:
            _skip(file, header.byte_count + start * header.row_bytes)
            for first in range(start, stop, rows):
                count = min(rows, stop - first)
                data = file.read(count * header.row_bytes)
                if len(data) != count * header.row_bytes:
                    raise InputError(
                        f"{path}: the file ends within row {first + len(data) // max(1, header.row_bytes)}"
                    )
                flat: Array = np.frombuffer(data, header.dtype)
                yield flat.reshape(count, *header.shape[1:]).astype(header.dtype.newbyteorder("="), copy=False)
            if stop == header.shape[0] and file.read(1):  # reading on also has gzip compare its checksum
                raise InputError(f"{path}: the file goes on after its last row")
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def is_idx(path: str | Path) -> bool:
    """Returns whether the file at ``path`` begins as an IDX file does; False if it can't be read."""
    try:
        with _opened(Path(path)) as file:
            head = file.read(4)
    except (OSError, EOFError, zlib.error):
        return False
    return len(head) == 4 and head[:2] == b"\0\0" and head[2] in _TYPES and head[3] > 0


def is_gzip(path: str | Path) -> bool:
    """Returns whether the file at ``path`` is gzip'd, whatever its name."""
    with Path(path).open("rb") as file:
        return file.read(2) == _GZIP_MAGIC


def _opened(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if is_gzip(path) else path.open("rb")


def _header(file: IO[bytes], path: Path) -> IdxHeader:
    magic = file.read(4)
    if len(magic) != 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or magic[3] == 0:
        raise InputError(f"{path}: not an IDX file, it begins with {magic.hex() or 'nothing'}")
    rank = magic[3]
    sizes = file.read(4 * rank)
    if len(sizes) != 4 * rank:
        raise InputError(f"{path}: the file ends within its header")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    return IdxHeader(np.dtype(_TYPES[magic[2]]), shape, 4 + 4 * rank)


def _check_length(path: Path, header: IdxHeader) -> None:
    wanted = header.byte_count + header.shape[0] * header.row_bytes
    found = path.stat().st_size
    if is_gzip(path):
        if wanted > found * _GZIP_EXPANSION:
            raise InputError(f"{path}: the header promises {wanted:,} bytes, more than {found:,} gzip'd ones can hold")
    elif found != wanted:
        raise InputError(f"{path}: the header promises {wanted:,} bytes and the file has {found:,}")


def _skip(file: IO[bytes], byte_count: int) -> None:
    if not isinstance(file, gzip.GzipFile):
        file.seek(byte_count, os.SEEK_SET)
        return
    while byte_count > 0 and (data := file.read(min(byte_count, _SKIP_BYTES))):
        byte_count -= len(data)


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError(f"{path}: can't be read: {reason}")
