"""Reading IDX files, the format of MNIST: a short header, then unsigned bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from modelport_trainer.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GZIP_MAGIC = b"\x1f\x8b"
_UINT8 = 0x08
_MOST_EXPANSION = 1100
"""Deflate cannot expand by more than about 1,032 to 1."""
_CHUNK_BYTES = 1 << 20


def read_idx(path: Path, *, rank: int) -> NDArray[np.uint8]:
    """Reads an IDX file of unsigned bytes, gzip'd or not.

    Args:
        path: The file; whether it is gzip'd is told from its first bytes, not from its name.
        rank: The number of dimensions that it must have: 3 for images, 1 for labels.

    Returns:
        A uint8 array of ``rank`` dimensions.

    Raises:
        DataError: If the file is missing, unreadable, of another format, cut off or too long.
    """
    try:
        with path.open("rb") as raw:
            stored_bytes = path.stat().st_size
            if raw.peek(2)[:2] != _GZIP_MAGIC:
                return _read(raw, path, rank, limit_bytes=stored_bytes)
            with gzip.GzipFile(fileobj=raw) as unpacked:
                return _read(unpacked, path, rank, limit_bytes=stored_bytes * _MOST_EXPANSION)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except EOFError:
        raise DataError(f"{path}: the gzip file is cut off; copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); copy or download it again") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _read(file: BinaryIO | gzip.GzipFile, path: Path, rank: int, *, limit_bytes: int) -> NDArray[np.uint8]:
    shape = _shape(file, path, rank)
    expected_bytes = math.prod(shape)
    if expected_bytes > limit_bytes:
        raise DataError(f"{path}: its header announces {_times(shape)} bytes, more than the file can hold")
    data = _read_at_most(file, expected_bytes + 1)
    if len(data) != expected_bytes:
        found = "more" if len(data) > expected_bytes else f"only {len(data):,}"
        raise DataError(f"{path}: its header announces {_times(shape)} bytes, it has {found}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _shape(file: BinaryIO | gzip.GzipFile, path: Path, rank: int) -> tuple[int, ...]:
    magic = file.read(4)
    expected = bytes([0, 0, _UINT8, rank])
    if magic != expected:
        kind = {1: "labels", 3: "images"}.get(rank, f"{rank} dimensions")
        raise DataError(
            f"{path}: not an IDX file of {kind}: begins with {magic.hex() or 'nothing'}, not {expected.hex()}"
        )
    sizes = file.read(4 * rank)
    if len(sizes) != 4 * rank:
        raise DataError(f"{path}: the file ends within its header")
    return struct.unpack(f">{rank}I", sizes)


def _read_at_most(file: BinaryIO | gzip.GzipFile, limit_bytes: int) -> bytes:
    """Reads in chunks: one read() would allocate all that a header announces before it finds the end."""
    chunks: list[bytes] = []
    left = limit_bytes
    while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape)
