"""A run's folder: its settings, its checkpoints and what came of it.

Every file is replaced as a whole, so a process that is killed leaves the old one or the new one::

    run.json          the settings that the run was started with
    checkpoint.npz    everything the next epoch depends on, and the history so far
    best.npz          the weights of the best epoch so far
    saved_model/      the exported model
    report/           what the report step wrote
    published.json    which version it became
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import zipfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelport_trainer.errors import RunError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HISTORY = "history"
_MAY_DIFFER = frozenset({"data.source", "training.epochs", "training.patience"})
"""What a resumed run may change: none of it has a part in what any one epoch computes."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that one run of training owns."""

    path: Path
    """The folder; it is made when it is opened."""

    @property
    def saved_model(self) -> Path:
        """Where the exported model goes."""
        return self.path / "saved_model"

    @property
    def report(self) -> Path:
        """Where the report goes."""
        return self.path / "report"

    @contextlib.contextmanager
    def open(self, settings: Mapping[str, Any], *, resume: bool) -> Generator[None]:
        """Owns the folder as long as the context lasts.

        Args:
            settings: What the run depends on, as plain JSON values by section.
            resume: Whether the folder must hold a run with these settings, or none.

        Raises:
            RunError: If the folder holds a run already, none to resume, one of other settings, or if
                another process is working in it.
        """
        stored = self._read_json("run.json")
        if resume and stored is None:
            raise RunError(f"{self.path}: no run to resume; leave out --resume to start one")
        if not resume and stored is not None:
            raise RunError(f"{self.path}: holds a run already; go on with --resume or give another --run-dir")
        if stored is not None:
            self._check_same(stored, settings)
        with self._locked():
            self.write_json("run.json", settings)
            yield

    def read_published(self) -> dict[str, Any] | None:
        """Returns which version the run became; None if it was not published."""
        return self._read_json("published.json")

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Replaces a JSON file of the folder."""
        replace_file(self.path / name, json.dumps(values, indent=2).encode() + b"\n")

    def write_best(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Stores the best weights so far."""
        replace_file(self.path / "best.npz", _pack(arrays, {}))

    def read_best(self) -> list[NDArray[Any]]:
        """Returns the best weights so far.

        Raises:
            RunError: If there are none, or the file is damaged.
        """
        stored = self._unpack("best.npz")
        if stored is None:
            raise RunError(f"{self.path}: has no best.npz; start afresh in another --run-dir")
        return stored[0]

    def write_checkpoint(self, arrays: Sequence[NDArray[Any]], history: Sequence[Mapping[str, Any]]) -> None:
        """Stores what the next epoch depends on."""
        encoded = np.frombuffer(json.dumps(list(history)).encode(), dtype=np.uint8)
        replace_file(self.path / "checkpoint.npz", _pack(arrays, {_HISTORY: encoded}))

    def read_checkpoint(self) -> tuple[list[NDArray[Any]], list[dict[str, Any]]] | None:
        """Returns arrays and history as they were stored; None before the first epoch's end.

        Raises:
            RunError: If the file is damaged.
        """
        stored = self._unpack("checkpoint.npz")
        if stored is None:
            return None
        arrays, others = stored
        return arrays, json.loads(others[_HISTORY].tobytes())

    def _check_same(self, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        before, now = dict(_flatten(stored)), dict(_flatten(json.loads(json.dumps(settings))))
        # Runs that were begun when there were no presets name none; their other settings tell.
        before.setdefault("preset", now.get("preset"))
        if before.get("data.sha256") != now.get("data.sha256"):
            raise RunError(f"{self.path}: was begun with other data; give the same, or another --run-dir")
        # The preset first: most of the others follow from it.
        for name in sorted((before.keys() | now.keys()) - _MAY_DIFFER, key=lambda name: (name != "preset", name)):
            if before.get(name) != now.get(name):
                option = name.rpartition(".")[2]
                raise RunError(
                    f"{self.path}: was begun with {option} {_shown(before.get(name))}, "
                    f"not {_shown(now.get(name))}; repeat the options that it was begun with"
                )

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(f"{self.path}: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path}: another process is training in it") from None
            yield

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.path / name).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / name}: cannot be read ({error})") from None
        return found

    def _unpack(self, name: str) -> tuple[list[NDArray[Any]], dict[str, NDArray[Any]]] | None:
        path = self.path / name
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                count = sum(key.isdigit() for key in stored)
                arrays = [np.asarray(stored[str(number)]) for number in range(count)]
                return arrays, {key: np.asarray(stored[key]) for key in stored if not key.isdigit()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise RunError(f"{path}: damaged ({error}); start afresh in another --run-dir") from None


def next_run_dir(root: Path, name: str, *, resume: bool) -> Path:
    """Returns ``root/name-N``: the newest that exists to resume, the next free one otherwise.

    Raises:
        RunError: If there is none to resume.
    """
    numbers = [
        int(path.name.removeprefix(f"{name}-"))
        for path in root.glob(f"{name}-*")
        if path.name.removeprefix(f"{name}-").isdigit()
    ]
    if not resume:
        return root / f"{name}-{max(numbers, default=0) + 1}"
    if not numbers:
        raise RunError(f"{root}: no run of {name} to resume; leave out --resume to start one")
    return root / f"{name}-{max(numbers)}"


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file as a whole: whoever reads it finds the old content or the new, also after a crash."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _pack(arrays: Sequence[NDArray[Any]], others: Mapping[str, NDArray[Any]]) -> bytes:
    packed = io.BytesIO()
    named: dict[str, Any] = {str(number): array for number, array in enumerate(arrays)} | dict(others)
    np.savez(packed, **named)
    return packed.getvalue()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(cast("dict[str, Any]", value), f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
