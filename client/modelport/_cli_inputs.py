"""Reads what ``modelport predict`` is given: arrays, IDX files, folders of images, in pieces of rows."""

from __future__ import annotations

import itertools
import math
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from modelport import idx
from modelport.exceptions import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_BATCH_BYTES = 128 << 10
_MAX_BATCH_ROWS = 1024


class TensorLike(Protocol):
    """What is asked of an input's description: the SDK's and the registry's both have it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int | None, ...] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """How inputs are read."""

    inputs: Sequence[TensorLike]
    """The inputs of the signature."""
    input_name: str = ""
    """The input that files without names of their own are for; empty for the only one."""
    resize: bool = False
    """Bring images to the size that the model takes, instead of refusing others."""

    @property
    def sole_input(self) -> TensorLike:
        """The input that a file without names is for."""
        names = ", ".join(spec.name for spec in self.inputs)
        if self.input_name:
            for spec in self.inputs:
                if spec.name == self.input_name:
                    return spec
            raise InputError(f"the model has no input {self.input_name!r}; it has {names}")
        if len(self.inputs) != 1:
            raise InputError(f"the model has {len(self.inputs)} inputs ({names}): give an .npz, or say --input-name")
        return self.inputs[0]


@dataclass(frozen=True, slots=True)
class Source:
    """Something to read rows from."""

    rows: int
    """How many rows there are."""
    row_bytes: int
    """The bytes that one row takes, all inputs together."""
    chunks: Callable[[int], Iterator[dict[str, Array]]]
    """Reads the rows in order, at most the given number at a time, each input under its name."""


def open_sources(paths: Sequence[Path], options: SourceOptions) -> Source:
    """Returns the rows of all ``paths``, one after the other.

    Raises:
        InputError: if a file is of no known kind, is damaged, or does not fit the model.
    """
    sources = [_open_source(path, options) for path in paths]

    def chunks(rows: int) -> Iterator[dict[str, Array]]:
        return itertools.chain.from_iterable(source.chunks(rows) for source in sources)

    return Source(sum(s.rows for s in sources), max(s.row_bytes for s in sources), chunks)


def batch_rows(source: Source) -> int:
    """Returns how many rows make a batch that is neither small nor slow to answer."""
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // max(1, source.row_bytes)))


def whole(paths: Sequence[Path], options: SourceOptions) -> dict[str, Array]:
    """Returns the arrays of one call, for a model that does not take rows.

    Raises:
        InputError: if there is not exactly one file, or it can't be read.
    """
    if len(paths) != 1:
        raise InputError("this signature does not take rows: give one .npy or .npz file, which makes one call")
    path = paths[0]
    if path.suffix == ".npz":
        with _npz(path) as file:
            return {spec.name: _loaded(path, file, spec.name) for spec in options.inputs}
    if path.suffix == ".npy":
        return {options.sole_input.name: np.asarray(_npy(path))}
    raise InputError(f"{path}: this signature does not take rows: give an .npy or .npz file")


def _open_source(path: Path, options: SourceOptions) -> Source:
    if path.is_dir():
        return _image_source(path, options)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file or folder")
    if path.suffix == ".npy":
        return _npy_source(path, options)
    if path.suffix == ".npz":
        return _npz_source(path, options)
    if path.suffix.lower() in _IMAGE_SUFFIXES:
        return _images([path], options)
    if idx.is_idx(path):
        return _idx_source(path, options)
    raise InputError(f"{path}: not an .npy, .npz, IDX, PNG or JPEG file, nor a folder of images")


def _npy(path: Path) -> Array:
    try:
        return cast("Array", np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from error


def _npy_source(path: Path, options: SourceOptions) -> Source:
    spec = options.sole_input
    name = spec.name
    array = _npy(path)
    if array.ndim == 0:
        raise InputError(f"{path}: holds a single value, and the model takes rows")
    _check_rows(f"{path}:", spec, array.shape)

    def chunks(rows: int) -> Iterator[dict[str, Array]]:
        for start in range(0, len(array), rows):
            yield {name: np.asarray(array[start : start + rows])}

    return Source(len(array), _row_bytes(array.dtype, array.shape), chunks)


def _idx_source(path: Path, options: SourceOptions) -> Source:
    spec = options.sole_input
    name = spec.name
    header = idx.read_header(path)
    _check_rows(f"{path}:", spec, header.shape)

    def chunks(rows: int) -> Iterator[dict[str, Array]]:
        return ({name: chunk} for chunk in idx.idx_chunks(path, rows))

    return Source(header.shape[0], header.row_bytes, chunks)


@dataclass(frozen=True, slots=True)
class _Member:
    """An array in an .npz and where its rows come from."""

    file: IO[bytes]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool

    def read(self, rows: int) -> Array:
        """Returns the next ``rows`` rows."""
        wanted = rows * _row_bytes(self.dtype, self.shape)
        data = self.file.read(wanted)
        if len(data) != wanted:
            raise EOFError("the array ends early")
        flat: Array = np.frombuffer(data, self.dtype)
        return flat.reshape(rows, *self.shape[1:])


def _npz(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error


@contextmanager
def _member(path: Path, file: zipfile.ZipFile, name: str) -> Generator[_Member, None, None]:
    try:
        stream = file.open(f"{name}.npy")
    except KeyError:
        held = ", ".join(n.removesuffix(".npy") for n in file.namelist()) or "nothing"
        raise InputError(f"{path}: has no array {name!r}, which the model takes; it has {held}") from None
    with stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read(stream)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise _unreadable(path, error) from error
        if dtype.hasobject:
            raise InputError(f"{path}: the array {name!r} holds Python objects, which are not read")
        yield _Member(stream, dtype, shape, is_fortran)


def _loaded(path: Path, file: zipfile.ZipFile, name: str) -> Array:
    with _member(path, file, name):
        pass  # says what is wrong with it
    try:
        with file.open(f"{name}.npy") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error


def _npz_source(path: Path, options: SourceOptions) -> Source:
    names = [spec.name for spec in options.inputs]
    with _npz(path) as file, ExitStack() as stack:
        members = {name: stack.enter_context(_member(path, file, name)) for name in names}
    for name, member in members.items():
        if not member.shape:
            raise InputError(f"{path}: the array {name!r} is a single value, and the model takes rows")
        if member.is_fortran and len(member.shape) > 1:
            raise InputError(f"{path}: the array {name!r} is in Fortran order; save it with np.ascontiguousarray")
    for spec in options.inputs:
        _check_rows(f"{path}: the array {spec.name!r}", spec, members[spec.name].shape)
    counts = {name: member.shape[0] for name, member in members.items()}
    if len(set(counts.values())) != 1:
        text = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"{path}: the arrays differ in their number of rows: {text}")
    rows = next(iter(counts.values()))
    row_bytes = sum(_row_bytes(member.dtype, member.shape) for member in members.values())
    return Source(rows, row_bytes, lambda size: _npz_chunks(path, names, rows, size))


def _npz_chunks(path: Path, names: Sequence[str], rows: int, size: int) -> Generator[dict[str, Array], None, None]:
    with _npz(path) as file, ExitStack() as stack:
        members = {name: stack.enter_context(_member(path, file, name)) for name in names}
        for start in range(0, rows, size):
            count = min(size, rows - start)
            try:
                chunk = {name: member.read(count) for name, member in members.items()}
            except (OSError, EOFError, zipfile.BadZipFile) as error:
                raise _unreadable(path, error) from error
            yield chunk


def _image_source(folder: Path, options: SourceOptions) -> Source:
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"{folder}: has no .png, .jpg or .jpeg files")
    return _images(paths, options)


def _images(paths: Sequence[Path], options: SourceOptions) -> Source:
    spec = options.sole_input
    height, width, channels = _image_shape(spec)
    if height is None or width is None:
        if options.resize:
            raise InputError(f"input {spec.name} takes images of any size: there is nothing to resize them to")
        height, width = _image_size(paths[0])
    reader = _ImageReader(height, width, channels, options.resize)

    def chunks(rows: int) -> Iterator[dict[str, Array]]:
        for start in range(0, len(paths), rows):
            yield {spec.name: np.stack([reader.read(path) for path in paths[start : start + rows]])}

    return Source(len(paths), height * width * (channels or 1), chunks)


def _image_shape(spec: TensorLike) -> tuple[int | None, int | None, int | None]:
    """Returns height, width and, where there is a dimension of them, the number of channels."""
    if spec.dtype == "uint8" and spec.shape is not None:
        if len(spec.shape) == 3:
            return spec.shape[1], spec.shape[2], None
        if len(spec.shape) == 4 and spec.shape[3] in (1, 3):
            return spec.shape[1], spec.shape[2], spec.shape[3]
    raise InputError(
        f"input {spec.name} takes {spec.dtype} {_shown(spec.shape)}; images make uint8 [any, height, width]"
    )


def _check_rows(what: str, spec: TensorLike, shape: Sequence[int]) -> None:
    """Checks the shape of a row here: a server knows the pieces that it gets, and not the file."""
    if spec.shape is None:
        return
    sizes, wanted = shape[1:], spec.shape[1:]
    if len(shape) != len(spec.shape) or any(want not in (None, size) for size, want in zip(sizes, wanted, strict=True)):
        raise InputError(f"{what} has shape {list(shape)}, and input {spec.name} takes {_shown(spec.shape)}")


def _shown(shape: Sequence[int | None] | None) -> str:
    return "of any shape" if shape is None else str(list(shape)).replace("None", "any")


@dataclass(frozen=True, slots=True)
class _ImageReader:
    height: int
    width: int
    channels: int | None
    resize: bool

    def read(self, path: Path) -> Array:
        """Returns the image at ``path``, uint8 [height, width] or [height, width, channels]."""
        from PIL import Image

        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB" if self.channels == 3 else "L")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise _unreadable(path, error) from error
        if image.size != (self.width, self.height):
            if not self.resize:
                found = f"{image.height} x {image.width}"
                wanted = f"{self.height} x {self.width}"
                raise InputError(f"{path}: is {found} pixels, and the model takes {wanted}; --resize changes that")
            image = image.resize((self.width, self.height))
        pixels = np.asarray(image, np.uint8)
        return pixels[..., np.newaxis] if self.channels == 1 else pixels


def _image_size(path: Path) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _row_bytes(dtype: np.dtype[Any], shape: Sequence[int]) -> int:
    return dtype.itemsize * math.prod(shape[1:])


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError(f"{path}: can't be read: {reason.splitlines()[0] if reason else type(error).__name__}")
