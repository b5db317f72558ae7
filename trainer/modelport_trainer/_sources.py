"""Where data comes from: each source is read into the same four arrays, still unchecked."""

from __future__ import annotations

import contextlib
import re
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelport import idx
from modelport.exceptions import InputError
from modelport_trainer import _libraries
from modelport_trainer.errors import DataError, OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BUILT_IN = ("digits", "mnist", "fashion_mnist")
"""The sources that have a name of their own; ``digits`` needs no network."""

_DIGITS_HIGHEST = 16
_DIGITS_TEST_SHARE = 0.2
_DIGITS_SPLIT_SEED = 0
_FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True, slots=True)
class DataSource:
    """Names where data comes from: a built-in source, an ``.npz`` file or a folder of IDX files."""

    kind: str
    """One of ``BUILT_IN``, or ``npz``, or ``idx``."""
    path: Path | None = None
    """The ``.npz`` file or the folder; None for built-in sources."""

    @classmethod
    def parse(cls, data: str | None, data_dir: Path | None = None) -> DataSource:
        """Returns the source that the options ``--data`` and ``--data-dir`` name; ``digits`` by default.

        Raises:
            OptionError: If both are given, or if ``data`` names no source.
        """
        if data_dir is not None:
            if data is not None:
                raise OptionError("give --data or --data-dir, not both")
            return cls("idx", data_dir)
        if data is None or data in BUILT_IN:
            return cls(data or "digits")
        if data.endswith(".npz"):
            return cls("npz", Path(data))
        raise OptionError(
            f"--data {data}: give one of {', '.join(BUILT_IN)} or an .npz file; a folder goes to --data-dir"
        )

    def __str__(self) -> str:
        return self.kind if self.path is None else f"{self.kind}:{self.path}"

    @property
    def suggested_name(self) -> str:
        """A model name made of the source's own; it may be empty."""
        if self.path is None:
            return self.kind
        stem = self.path.resolve().name.removesuffix(".npz").lower()
        return re.sub(r"[^a-z0-9_-]+", "-", stem).strip("-_")[:64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawData:
    """Four arrays as a source has them, of any shape and dtype."""

    source: DataSource
    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]
    class_names: Sequence[str] | None = None


def read(source: DataSource) -> RawData:
    """Reads a source as it is, without judging what it holds.

    Raises:
        DataError: If it cannot be read.
    """
    if source.kind == "digits":
        return _digits(source)
    if source.kind in BUILT_IN:
        return _from_keras(source)
    if source.path is None:
        raise OptionError(f"a source of kind {source.kind!r} needs a path")
    return _npz(source, source.path) if source.kind == "npz" else _idx_folder(source, source.path)


def _digits(source: DataSource) -> RawData:
    """Splits by a seed of its own, so that every version is tested on the same images whatever its seed."""
    sklearn = _libraries.sklearn()
    found = sklearn.datasets.load_digits()
    images = np.rint(found.images * (255 / _DIGITS_HIGHEST)).astype(np.uint8)
    x_train, x_test, y_train, y_test = sklearn.model_selection.train_test_split(
        images,
        found.target,
        test_size=_DIGITS_TEST_SHARE,
        random_state=_DIGITS_SPLIT_SEED,
        stratify=found.target,
    )
    return RawData(source=source, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def _from_keras(source: DataSource) -> RawData:
    datasets = _libraries.keras().datasets
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Keras draws its progress bar on standard output
            (x_train, y_train), (x_test, y_test) = getattr(datasets, source.kind).load_data()
    except Exception as error:  # Keras raises bare Exception when a download fails
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source} could not be downloaded ({reason}); with the files at hand use --data-dir, "
            "or --data digits, which needs no network"
        ) from error
    names = _FASHION_CLASSES if source.kind == "fashion_mnist" else None
    return RawData(source=source, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, class_names=names)


def _idx_folder(source: DataSource, folder: Path) -> RawData:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    return RawData(
        source=source,
        x_train=_read_idx(folder, "train-images-idx3-ubyte", rank=3),
        y_train=_read_idx(folder, "train-labels-idx1-ubyte", rank=1),
        x_test=_read_idx(folder, "t10k-images-idx3-ubyte", rank=3),
        y_test=_read_idx(folder, "t10k-labels-idx1-ubyte", rank=1),
    )


def _read_idx(folder: Path, name: str, *, rank: int) -> NDArray[Any]:
    path = _idx_file(folder, name)
    try:
        found = len(idx.read_header(path).shape)
        if found != rank:
            raise DataError(f"{path}: has {found} dimensions; {name} needs {rank}")
        return idx.read_idx(path)
    except InputError as error:
        raise DataError(str(error)) from None


def _idx_file(folder: Path, name: str) -> Path:
    """Also finds the names with a dot before ``idx``, which some unpackers leave."""
    stems = (name, name.replace("-idx", ".idx"))
    for candidate in (folder / f"{stem}{suffix}" for stem in stems for suffix in ("", ".gz")):
        if candidate.is_file():
            return candidate
    raise DataError(f"{folder}: has no {name} and no {name}.gz")


def _npz(source: DataSource, path: Path) -> RawData:
    try:
        # numpy leaves a file that it opens itself open when it is no zip archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            missing = [name for name in _NPZ_ARRAYS if name not in stored]
            if missing:
                raise DataError(f"{path}: has no {', '.join(missing)}; it needs {', '.join(_NPZ_ARRAYS)}")
            arrays = {name: np.asarray(stored[name]) for name in _NPZ_ARRAYS}
            names = [str(name) for name in stored["class_names"]] if "class_names" in stored else None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a readable .npz file ({error})") from None
    return RawData(source=source, class_names=names, **arrays)
