"""Writes what ``modelport predict`` gets: a table, .npy, .npz, JSON lines or CSV, row after row."""

from __future__ import annotations

import base64
import csv
import json
import math
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

import numpy as np

from modelport.exceptions import InputError

if TYPE_CHECKING:
    from collections.abc import Generator

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Outputs = Mapping[str, Array]

FORMATS = {".npy": "npy", ".npz": "npz", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv"}
"""The format that a file's suffix stands for."""

_TABLE_ROWS = 10
_SHOWN_VALUES = 10


class Sink(Protocol):
    """Takes outputs a piece at a time."""

    def write(self, outputs: Outputs) -> None:
        """Takes the outputs of the next rows, each array rows first."""
        ...

    def close(self) -> None:
        """Finishes what was written."""
        ...


def format_of(output: Path | None, wanted: str | None) -> str:
    """Returns the format to write: as asked for, else by the file's suffix, else a table.

    Raises:
        InputError: if the suffix says nothing.
    """
    if wanted:
        return wanted
    if output is None:
        return "table"
    found = FORMATS.get(output.suffix.lower())
    if found is None:
        raise InputError(f"{output}: say what to write with --format, or end the name in {', '.join(FORMATS)}")
    return found


@contextmanager
def open_sink(output: Path | None, kind: str, *, has_rows: bool) -> Generator[Sink, None, None]:
    """Opens what writes ``kind`` to ``output``, or to stdout; the file appears whole or not at all.

    Args:
        output: the file; None for stdout.
        kind: table, npy, npz, jsonl or csv.
        has_rows: outputs come in pieces of rows; else there is one piece, written as it is.

    Raises:
        InputError: if the format can't go there.
    """
    if kind == "table":
        sink: Sink = TableSink()
        yield sink
        sink.close()
    elif output is None:
        if kind in ("npy", "npz"):
            raise InputError(f"--format {kind} needs --output FILE")
        sink = _text_sink(sys.stdout, kind)
        yield sink
        sink.close()
    else:
        with _replaced(output) as temporary:
            yield from _file_sink(temporary, kind, has_rows)


def _file_sink(path: Path, kind: str, has_rows: bool) -> Iterator[Sink]:
    if kind in ("npy", "npz"):
        sink: Sink = NpySink(path, has_rows) if kind == "npy" else NpzSink(path, has_rows)
        try:
            yield sink
        finally:
            sink.close()
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            sink = _text_sink(file, kind)
            yield sink
            sink.close()


def _text_sink(file: TextIO, kind: str) -> Sink:
    return JsonLinesSink(file) if kind == "jsonl" else CsvSink(file)


@contextmanager
def _replaced(output: Path) -> Generator[Path, None, None]:
    """Gives a temporary file beside ``output`` that takes its place if all goes well."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent)
    except OSError as error:
        raise InputError(f"{output}: can't be written: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(output)
    except OSError as error:
        raise InputError(f"{output}: can't be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


class NpySink:
    """Writes the one output as .npy; the header, which has the number of rows, is written last again.

    Args:
        path: the file.
        has_rows: whether pieces are joined row after row.
        name: the output to write; None for the only one.
    """

    def __init__(self, path: Path, has_rows: bool, name: str | None = None) -> None:
        self._file = path.open("wb")
        self._has_rows = has_rows
        self._name = name
        self._rows = 0
        self._dtype: np.dtype[Any] | None = None
        self._row_shape: tuple[int, ...] = ()

    def write(self, outputs: Outputs) -> None:
        """Takes the outputs of the next rows."""
        if self._name is None and len(outputs) != 1:
            raise InputError(f".npy holds one array and there are {', '.join(outputs)}: say --outputs, or write .npz")
        array = _storable(self._name or "", outputs[self._name or next(iter(outputs))])
        if not self._has_rows:
            np.save(self._file, array, allow_pickle=False)
            return
        if self._dtype is None:
            self._dtype, self._row_shape = array.dtype, array.shape[1:]
            self._write_header()
        if array.shape[1:] != self._row_shape or array.dtype != self._dtype:
            raise InputError(f"the answers' shapes differ, {self._row_shape} and {array.shape[1:]}: write .jsonl")
        self._file.write(np.ascontiguousarray(array).data)
        self._rows += len(array)

    def close(self) -> None:
        """Writes the final header."""
        if self._dtype is not None:
            self._file.seek(0)
            self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        # numpy leaves room in it for the first dimension to grow, so that it keeps its length
        assert self._dtype is not None
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._rows, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(cast("Any", self._file), header)


class NpzSink:
    """Writes every output as an array of one .npz, by way of files of their own beside it."""

    def __init__(self, path: Path, has_rows: bool) -> None:
        self._path = path
        self._has_rows = has_rows
        self._folder = tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent)
        self._members: dict[str, NpySink] = {}

    def write(self, outputs: Outputs) -> None:
        """Takes the outputs of the next rows."""
        for name, array in outputs.items():
            if name not in self._members:
                self._members[name] = NpySink(self._file(len(self._members)), self._has_rows, name)
            self._members[name].write({name: array})

    def close(self) -> None:
        """Puts the arrays into one file."""
        with self._folder, zipfile.ZipFile(self._path, "w", allowZip64=True) as file:
            for number, (name, member) in enumerate(self._members.items()):
                member.close()
                file.write(self._file(number), f"{name}.npy")

    def _file(self, number: int) -> Path:
        return Path(self._folder.name) / f"{number}.npy"


class JsonLinesSink:
    """Writes a JSON object a row."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, outputs: Outputs) -> None:
        """Takes the outputs of the next rows."""
        columns = {name: _plain(array) for name, array in outputs.items()}
        for row in zip(*columns.values(), strict=True):
            line = json.dumps(dict(zip(columns, row, strict=True)), separators=(",", ":"), allow_nan=False)
            self._file.write(line + "\n")

    def close(self) -> None:
        """Flushes what was written."""
        self._file.flush()


class CsvSink:
    """Writes a line a row, under a line of names; arrays take a column an element."""

    def __init__(self, file: TextIO) -> None:
        self._writer = csv.writer(file, lineterminator="\n")
        self._file = file
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def write(self, outputs: Outputs) -> None:
        """Takes the outputs of the next rows."""
        shapes = {name: array.shape[1:] for name, array in outputs.items()}
        if self._shapes is None:
            self._shapes = shapes
            self._writer.writerow([c for name, shape in shapes.items() for c in _columns(name, shape)])
        elif shapes != self._shapes:
            raise InputError("the answers' shapes differ from row to row: write .jsonl")
        flat = [_plain(array.reshape(len(array), math.prod(array.shape[1:]))) for array in outputs.values()]
        for row in zip(*flat, strict=True):
            self._writer.writerow([value for part in row for value in part])

    def close(self) -> None:
        """Flushes what was written."""
        self._file.flush()


class TableSink:
    """Prints the first rows as a table, once it has them all."""

    def __init__(self) -> None:
        self._rows: list[list[str]] = []
        self._names: list[str] = []

    def write(self, outputs: Outputs) -> None:
        """Keeps the rows if they are among the first."""
        self._names = list(outputs)
        room = _TABLE_ROWS - len(self._rows)
        for index in range(min(room, len(next(iter(outputs.values()), ())))):
            self._rows.append([_shown(array[index]) for array in outputs.values()])

    def close(self) -> None:
        """Prints the table."""
        from rich.console import Console
        from rich.table import Table

        table = Table("row", *self._names)
        for number, row in enumerate(self._rows):
            table.add_row(str(number), *row)
        Console(soft_wrap=not sys.stdout.isatty()).print(table)


def _columns(name: str, shape: Sequence[int]) -> list[str]:
    return ["_".join(map(str, (name, *place))) for place in np.ndindex(*shape)]


def _storable(name: str, array: Array) -> Array:
    if array.dtype.hasobject:
        raise InputError(f"output {name or 'strings'}: texts go into .jsonl or .csv, not into .npy or .npz")
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _plain(array: Array) -> list[Any]:
    """Returns nested lists of what JSON has; numbers that it has not become text, such as "NaN"."""
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.hasobject or (array.dtype.kind == "f" and not bool(np.isfinite(array).all())):
        return [_plain_item(item) for item in array.tolist()]
    if array.dtype.name in ("float16", "float32"):
        return _shortest(array)
    return cast("list[Any]", array.tolist())


def _shortest(array: Array) -> list[Any]:
    """Returns numbers that print as short as their precision allows: 0.1 and not 0.10000000149011612."""
    texts = array.astype(str).astype(np.float64)
    return cast("list[Any]", texts.tolist())


def _plain_item(item: object) -> object:
    if isinstance(item, list):
        return [_plain_item(i) for i in cast("list[object]", item)]
    if isinstance(item, bytes):
        try:
            return item.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(item).decode()}
    if isinstance(item, float) and item != item:
        return "NaN"
    if item in (float("inf"), float("-inf")):
        return "Infinity" if item == float("inf") else "-Infinity"
    return item


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, np.ndarray):
        array = cast("Array", value)
        return np.array2string(array, precision=4, threshold=_SHOWN_VALUES, suppress_small=True, max_line_width=100)
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)
