"""Step 1, data: load it, check it, clean it, and say what was found."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelport_trainer._sources import BUILT_IN, DataSource, RawData, read
from modelport_trainer.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BUILT_IN", "DataReport", "DataSource", "Dataset", "Removal", "Split", "SplitReport", "load"]

_FEWEST_TRAINING_IMAGES = 10
_MOST_CLASSES = 10_000


@dataclass(frozen=True, slots=True)
class Split:
    """Images with their labels."""

    images: NDArray[np.uint8]
    """uint8 ``[rows, height, width]``, 0 to 255."""
    labels: NDArray[np.int64]
    """int64 ``[rows]``, 0 to classes - 1."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[Any]) -> Split:
        """Returns the rows that an index or a mask selects."""
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What a model is trained and tested on, checked and cleaned."""

    source: DataSource
    train: Split
    test: Split
    class_names: tuple[str, ...]
    """One name per class; the class's number where the source has no names."""
    sha256: str
    """The digest of all images and labels, train and test, after cleaning."""

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return _image_shape(self.train.images)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """What was found in train or test before anything was removed."""

    rows: int
    image_shape: tuple[int, int]
    dtype: str
    lowest: int
    highest: int
    mean: float
    rows_per_class: tuple[int, ...]
    unlabelled: int
    """Rows with a label below 0."""
    constant: int
    """Images in which all pixels are equal."""
    empty: int
    """Of those, the ones that are all zero."""
    duplicates: int
    """Images that repeat an earlier one of the same split, byte for byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """Rows that cleaning left out."""

    split: str
    reason: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What loading found and what cleaning did."""

    source: str
    sha256: str
    class_names: tuple[str, ...]
    train: SplitReport
    test: SplitReport
    duplicates_across: int
    """Training rows whose image is also a test image."""
    contradictions: int
    """Training rows whose image occurs in train with another label, too."""
    removed: tuple[Removal, ...]
    notes: tuple[str, ...]
    """What was noticed and left as it is."""
    train_rows: int
    """Training rows that remain."""
    test_rows: int
    """Test rows that remain."""

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain JSON values."""
        return asdict(self)


def load(source: DataSource) -> tuple[Dataset, DataReport]:
    """Reads, checks and cleans a source.

    Cleaning leaves out of train: unlabelled rows, constant images, images that are test images too, images
    that occur with different labels, and repeats. Of test, which must stay comparable, it leaves out only
    unlabelled rows, which nobody could score.

    Raises:
        DataError: If the source cannot be read or holds nothing that a classifier can be trained on.
    """
    return _prepare(read(source))


def _prepare(raw: RawData) -> tuple[Dataset, DataReport]:
    train = _checked_split(raw, "train", raw.x_train, raw.y_train)
    test = _checked_split(raw, "test", raw.x_test, raw.y_test)
    if _image_shape(train.images) != _image_shape(test.images):
        raise DataError(f"{raw.source}: training images are {_by(train.images)}, test images {_by(test.images)} pixels")
    class_names = _class_names(raw, train, test)
    keys = _image_keys(train.images), _image_keys(test.images)
    reasons = _reasons_to_drop(train, *keys)
    kept_train = train.take(np.array([reason is None for reason in reasons], dtype=bool))
    kept_test = test.take(test.labels >= 0)
    _check_enough(raw, kept_train, kept_test)
    dataset = Dataset(
        source=raw.source,
        train=kept_train,
        test=kept_test,
        class_names=class_names,
        sha256=_digest(kept_train, kept_test),
    )
    removed = [
        Removal(split="train", reason=reason, rows=rows)
        for reason, rows in Counter(reason for reason in reasons if reason is not None).items()
    ]
    if len(kept_test) != len(test):
        removed.append(Removal(split="test", reason="no label", rows=len(test) - len(kept_test)))
    train_report = _describe(train, keys[0], len(class_names))
    test_report = _describe(test, keys[1], len(class_names))
    in_test = set(keys[1])
    report = DataReport(
        source=str(raw.source),
        sha256=dataset.sha256,
        class_names=class_names,
        train=train_report,
        test=test_report,
        duplicates_across=sum(key in in_test for key in keys[0]),
        contradictions=_count_contradictions(train, keys[0]),
        removed=tuple(removed),
        notes=_notes(dataset, test_report),
        train_rows=len(kept_train),
        test_rows=len(kept_test),
    )
    return dataset, report


def _checked_split(raw: RawData, split: str, images: NDArray[Any], labels: NDArray[Any]) -> Split:
    where = f"{raw.source}: the {split} set's"
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[:, :, :, 0]
    if images.ndim != 3 or 0 in images.shape[1:]:
        raise DataError(f"{where} images have shape {list(images.shape)}; need [rows, height, width]")
    if images.dtype != np.uint8:
        raise DataError(f"{where} images are {images.dtype}; need uint8, 0 (black) to 255 (white)")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(f"{where} labels have shape {list(labels.shape)}; need one class number per image")
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where} labels are {labels.dtype}; need integers, 0 to classes - 1")
    if len(images) != len(labels):
        raise DataError(f"{where} counts differ: {len(images):,} images, {len(labels):,} labels")
    if len(images) == 0:
        raise DataError(f"{where} images are none at all")
    return Split(np.ascontiguousarray(images), labels.astype(np.int64))


def _class_names(raw: RawData, train: Split, test: Split) -> tuple[str, ...]:
    highest = int(max(train.labels.max(), test.labels.max()))
    present = np.unique(train.labels[train.labels >= 0]).size
    if present < 2:
        raise DataError(f"{raw.source}: the training labels name {present} class; a classifier needs two")
    if highest >= _MOST_CLASSES or highest + 1 > 2 * present:
        raise DataError(
            f"{raw.source}: labels go up to {highest:,} but only {present:,} classes occur in train; "
            "number the classes 0, 1, 2, ..."
        )
    if raw.class_names is None:
        return tuple(str(number) for number in range(highest + 1))
    if len(raw.class_names) <= highest:
        raise DataError(f"{raw.source}: {len(raw.class_names)} class names, but labels go up to {highest}")
    return tuple(raw.class_names)


def _image_keys(images: NDArray[np.uint8]) -> list[bytes]:
    rows = images.reshape(len(images), -1)
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]


def _reasons_to_drop(train: Split, keys: Sequence[bytes], test_keys: Sequence[bytes]) -> list[str | None]:
    """Names for every training row the first reason to leave it out, or None."""
    in_test = set(test_keys)
    labels = _labels_by_image(train, keys)
    constant = _constant(train.images)
    seen: set[bytes] = set()
    reasons: list[str | None] = []
    for row, key in enumerate(keys):
        reason = None
        if train.labels[row] < 0:
            reason = "no label"
        elif constant[row]:
            reason = "all pixels equal"
        elif key in in_test:
            reason = "also a test image"
        elif len(labels[key]) > 1:
            reason = "occurs with different labels"
        elif key in seen:
            reason = "repeats an earlier image"
        else:
            seen.add(key)
        reasons.append(reason)
    return reasons


def _labels_by_image(split: Split, keys: Sequence[bytes]) -> Mapping[bytes, set[int]]:
    found: dict[bytes, set[int]] = {}
    for key, label in zip(keys, split.labels.tolist(), strict=True):
        if label >= 0:
            found.setdefault(key, set()).add(label)
    return found


def _count_contradictions(train: Split, keys: Sequence[bytes]) -> int:
    labels = _labels_by_image(train, keys)
    return sum(len(labels.get(key, ())) > 1 for key in keys)


def _constant(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    flat = images.reshape(len(images), -1)
    constant: NDArray[np.bool_] = flat.min(axis=1) == flat.max(axis=1)
    return constant


def _describe(split: Split, keys: Sequence[bytes], classes: int) -> SplitReport:
    constant = _constant(split.images)
    labelled = split.labels[split.labels >= 0]
    return SplitReport(
        rows=len(split),
        image_shape=_image_shape(split.images),
        dtype=str(split.images.dtype),
        lowest=int(split.images.min()),
        highest=int(split.images.max()),
        mean=round(float(split.images.mean()), 3),
        rows_per_class=tuple(np.bincount(labelled, minlength=classes).tolist()),
        unlabelled=len(split) - len(labelled),
        constant=int(constant.sum()),
        empty=int((constant & (split.images[:, 0, 0] == 0)).sum()),
        duplicates=len(keys) - len(set(keys)),
    )


def _check_enough(raw: RawData, train: Split, test: Split) -> None:
    if len(train) < _FEWEST_TRAINING_IMAGES:
        raise DataError(
            f"{raw.source}: {len(train)} training images are left after cleaning; "
            f"need at least {_FEWEST_TRAINING_IMAGES}"
        )
    if len(test) == 0:
        raise DataError(f"{raw.source}: no test image has a label")
    if int(train.images.max()) == int(train.images.min()):
        raise DataError(f"{raw.source}: all pixels of all training images are equal")


def _notes(dataset: Dataset, test: SplitReport) -> tuple[str, ...]:
    notes: list[str] = []
    trained = set(np.unique(dataset.train.labels).tolist())
    absent = [name for number, name in enumerate(dataset.class_names) if number not in trained]
    if absent:
        notes.append(f"no training image of class {', '.join(absent)}")
    if test.duplicates:
        notes.append(f"{test.duplicates:,} test images repeat earlier ones; test is left as it is")
    if test.constant:
        notes.append(f"{test.constant:,} test images are constant; test is left as it is")
    highest = int(dataset.train.images.max())
    if highest <= 1:
        notes.append(f"the brightest training pixel is {highest} of 255: were the images scaled already?")
    return tuple(notes)


def _digest(train: Split, test: Split) -> str:
    digest = hashlib.sha256()
    for array in (train.images, train.labels, test.images, test.labels):
        digest.update(f"{array.dtype.str}{list(array.shape)}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _image_shape(images: NDArray[np.uint8]) -> tuple[int, int]:
    return int(images.shape[1]), int(images.shape[2])


def _by(images: NDArray[np.uint8]) -> str:
    height, width = _image_shape(images)
    return f"{height} x {width}"
