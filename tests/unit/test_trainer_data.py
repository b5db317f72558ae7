"""Data: what is found, what is cleaned, and one clear line for each bad file."""

from __future__ import annotations

import gzip
import struct
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from modelport.exceptions import ModelportError
from modelport_trainer import _libraries
from modelport_trainer.data import DataReport, Dataset, DataSource, load
from modelport_trainer.errors import DataError, OptionError

Arrays = dict[str, NDArray[Any]]


def arrays(train: int = 40, test: int = 20, classes: int = 4) -> Arrays:
    """Distinct random images with every class in turn."""
    random = np.random.default_rng(5)
    images = random.integers(0, 256, (train + test, 6, 7)).astype(np.uint8)
    labels = np.arange(train + test) % classes
    return {
        "x_train": images[:train],
        "y_train": labels[:train],
        "x_test": images[train:],
        "y_test": labels[train:],
    }


def load_npz(folder: Path, values: Arrays) -> tuple[Dataset, DataReport]:
    path = folder / "some.npz"
    np.savez(path, allow_pickle=False, **values)
    return load(DataSource("npz", path))


def idx(array: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx_folder(folder: Path, values: Arrays, suffix: str = "") -> None:
    names = {
        "x_train": "train-images-idx3-ubyte",
        "y_train": "train-labels-idx1-ubyte",
        "x_test": "t10k-images-idx3-ubyte",
        "y_test": "t10k-labels-idx1-ubyte",
    }
    for key, name in names.items():
        data = idx(values[key].astype(np.uint8))
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)


def one_line(error: pytest.ExceptionInfo[ModelportError]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def test_digits_are_split_alike_every_time_and_evenly() -> None:
    dataset, report = load(DataSource("digits"))
    again, _ = load(DataSource("digits"))
    assert dataset.sha256 == again.sha256
    assert (report.train_rows, report.test_rows) == (1437, 360)
    assert dataset.image_shape == (8, 8)
    assert dataset.class_names == tuple("0123456789")
    shares = np.array(report.test.rows_per_class) / np.array(report.train.rows_per_class)
    assert np.abs(shares - 0.25).max() < 0.02
    assert (report.train.lowest, report.train.highest) == (0, 255)
    # 16 steps of grey become 17 distinct values, the middle one rounded to even.
    assert np.unique(dataset.train.images).tolist() == [round(step * 255 / 16) for step in range(17)]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_folder_of_idx_files(tmp_path: Path, suffix: str) -> None:
    values = arrays()
    write_idx_folder(tmp_path, values, suffix)
    dataset, report = load(DataSource("idx", tmp_path))
    np.testing.assert_array_equal(dataset.train.images, values["x_train"])
    np.testing.assert_array_equal(dataset.test.labels, values["y_test"])
    assert dataset.train.labels.dtype == np.int64
    assert report.removed == ()
    assert report.train.rows_per_class == (10, 10, 10, 10)


def test_the_same_data_has_the_same_digest_whatever_it_is_stored_in(tmp_path: Path) -> None:
    values = arrays()
    write_idx_folder(tmp_path, values)
    stored, _ = load_npz(tmp_path, values)
    assert stored.sha256 == load(DataSource("idx", tmp_path))[0].sha256
    values["y_test"] = values["y_test"][::-1]
    assert load_npz(tmp_path, values)[0].sha256 != stored.sha256


def test_cleaning_says_what_it_leaves_out_and_why(tmp_path: Path) -> None:
    values = arrays()
    x, y = values["x_train"], values["y_train"]
    x[1] = x[0]  # repeats, same label
    y[1] = y[0]
    x[3], y[3] = x[2], (y[2] + 1) % 4  # two labels for one image
    x[4] = values["x_test"][0]
    x[5] = 0
    x[6] = 77
    y[7] = -1
    values["x_test"][2] = values["x_test"][1]
    values["x_test"][3] = 9
    dataset, report = load_npz(tmp_path, values)

    assert {(removal.reason, removal.rows) for removal in report.removed} == {
        ("repeats an earlier image", 1),
        ("occurs with different labels", 2),
        ("also a test image", 1),
        ("all pixels equal", 2),
        ("no label", 1),
    }
    assert (report.duplicates_across, report.contradictions) == (1, 2)
    assert (report.train.duplicates, report.train.constant, report.train.empty) == (2, 2, 1)
    assert report.train.unlabelled == 1
    assert report.train_rows == len(dataset.train) == 33
    np.testing.assert_array_equal(dataset.train.images[0], x[0])
    np.testing.assert_array_equal(dataset.train.images[1:], x[8:])
    # The test set stays as it is, and the report says so.
    np.testing.assert_array_equal(dataset.test.images, values["x_test"])
    assert (report.test.duplicates, report.test.constant) == (1, 1)
    assert sum("test is left as it is" in note for note in report.notes) == 2


def test_unlabelled_test_images_are_left_out_and_told(tmp_path: Path) -> None:
    values = arrays()
    values["y_test"][:3] = -1
    dataset, report = load_npz(tmp_path, values)
    assert len(dataset.test) == 17
    assert [(removal.split, removal.rows) for removal in report.removed] == [("test", 3)]


def test_a_channel_axis_a_column_of_labels_and_names_are_understood(tmp_path: Path) -> None:
    values = arrays()
    names = np.array(["ant", "bee", "cat", "dog"])
    dataset, _ = load_npz(
        tmp_path,
        values | {"x_train": values["x_train"][..., None], "y_train": values["y_train"][:, None], "class_names": names},
    )
    assert dataset.train.images.shape == (40, 6, 7)
    assert dataset.class_names == ("ant", "bee", "cat", "dog")


def test_images_that_were_scaled_already_are_noticed(tmp_path: Path) -> None:
    values = arrays()
    values = values | {"x_train": values["x_train"] & 1, "x_test": values["x_test"] & 1}
    assert any("scaled already" in note for note in load_npz(tmp_path, values)[1].notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((40, 6, 7), np.float32)}, "images are float32; need uint8"),
        ({"x_train": np.zeros((40, 42), np.uint8)}, "need [rows, height, width]"),
        ({"x_train": np.zeros((40, 0, 7), np.uint8)}, "need [rows, height, width]"),
        ({"x_test": np.ones((20, 6, 8), np.uint8)}, "training images are 6 x 7, test images 6 x 8"),
        ({"y_train": np.arange(39) % 4}, "40 images, 39 labels"),
        ({"y_train": np.linspace(0, 1, 40)}, "labels are float64; need integers"),
        ({"y_train": np.zeros((40, 4), np.int64)}, "need one class number per image"),
        ({"y_train": np.full(40, 3)}, "a classifier needs two"),
        ({"y_train": np.arange(40) % 4 * 100}, "number the classes 0, 1, 2"),
        ({"y_test": np.full(20, -1)}, "no test image has a label"),
        ({"x_train": np.full((40, 6, 7), 3, np.uint8)}, "0 training images are left after cleaning"),
        ({"x_test": np.zeros((0, 6, 7), np.uint8), "y_test": np.zeros(0, np.int64)}, "images are none at all"),
        ({"class_names": np.array(["a", "b"])}, "2 class names"),
        ({"x_train": np.array([[None]], dtype=object)}, "not a readable .npz file"),
    ],
)
def test_data_that_makes_no_sense_gets_one_clear_line(tmp_path: Path, change: Arrays, message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, allow_pickle=True, **(arrays() | change))
    with pytest.raises(DataError) as error:
        load(DataSource("npz", path))
    assert message in one_line(error)
    assert "bad.npz" in one_line(error)


def test_bad_npz_files_get_one_clear_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "half.npz", x_train=np.zeros(3))
    (tmp_path / "text.npz").write_text("not a zip")
    np.savez(tmp_path / "whole.npz", allow_pickle=False, **arrays())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:900])
    expected = {
        "half": "has no y_train, x_test, y_test",
        "text": "not a readable",
        "cut": "not a readable",
        "no": "no such",
    }
    for name, message in expected.items():
        with pytest.raises(DataError) as error:
            load(DataSource("npz", tmp_path / f"{name}.npz"))
        assert message in one_line(error)


IMAGES = idx(np.zeros((40, 6, 7), np.uint8))
ZIPPED = gzip.compress(IMAGES, mtime=0)  # else the test's name says when it was made


@pytest.mark.parametrize(
    ("name", "suffix", "content", "message"),
    [
        ("train-images-idx3-ubyte", ".gz", ZIPPED[:-6], "can't be read"),
        ("train-images-idx3-ubyte", ".gz", ZIPPED[:30], "can't be read"),
        ("train-images-idx3-ubyte", "", IMAGES[:-1], "promises 1,696 bytes"),
        ("train-images-idx3-ubyte", "", IMAGES + b"x", "promises 1,696 bytes"),
        ("train-images-idx3-ubyte", ".gz", gzip.compress(IMAGES + b"x", mtime=0), "goes on"),
        ("train-images-idx3-ubyte", "", b"PNG and so on", "not an IDX file"),
        ("train-images-idx3-ubyte", "", b"", "begins with nothing"),
        ("train-images-idx3-ubyte", "", b"\0\0\x08\x03\0\0", "ends within its header"),
        ("train-images-idx3-ubyte", "", idx(np.zeros(40, np.uint8)), "has 1 dimensions"),
        ("t10k-labels-idx1-ubyte", "", idx(np.zeros(19, np.uint8)), "20 images, 19 labels"),
        ("t10k-labels-idx1-ubyte", "", None, "has no t10k-labels-idx1-ubyte"),
    ],
)  # fmt: skip
def test_bad_idx_files_get_one_clear_line(
    tmp_path: Path, name: str, suffix: str, content: bytes | None, message: str
) -> None:
    write_idx_folder(tmp_path, arrays())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / f"{name}{suffix}").write_bytes(content)
    with pytest.raises(DataError) as error:
        load(DataSource("idx", tmp_path))
    assert message in one_line(error)


def test_a_header_that_promises_terabytes_allocates_nothing(tmp_path: Path) -> None:
    write_idx_folder(tmp_path, arrays())
    (tmp_path / "train-images-idx3-ubyte").unlink()
    header = struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**16, 2**16)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(1000)))
    with pytest.raises(DataError, match=r"more than .* can hold"):
        load(DataSource("idx", tmp_path))


def test_no_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise Exception("URL fetch failure on https://example: None -- [Errno -3] no name\nmore")

    mnist = types.SimpleNamespace(load_data=fail)
    keras = types.SimpleNamespace(datasets=types.SimpleNamespace(mnist=mnist))
    monkeypatch.setattr(_libraries, "keras", lambda: keras)
    with pytest.raises(DataError) as error:
        load(DataSource("mnist"))
    assert "could not be downloaded (URL fetch failure" in one_line(error)


def test_what_the_options_mean(tmp_path: Path) -> None:
    assert DataSource.parse(None) == DataSource("digits")
    assert DataSource.parse("fashion_mnist").suggested_name == "fashion_mnist"
    assert DataSource.parse("x/My data.npz").suggested_name == "my-data"
    assert DataSource.parse(None, tmp_path / "Fashion MNIST").suggested_name == "fashion-mnist"
    for wrong in ("cifar", "somewhere/"):
        with pytest.raises(OptionError):
            DataSource.parse(wrong)
    with pytest.raises(OptionError, match="not both"):
        DataSource.parse("mnist", tmp_path)


def test_mnist_has_no_duplicates(mnist_dir: Path) -> None:
    dataset, report = load(DataSource("idx", mnist_dir))
    assert (report.train_rows, report.test_rows) == (60_000, 10_000)
    assert (report.train.duplicates, report.test.duplicates, report.duplicates_across) == (0, 0, 0)
    assert not report.removed
    assert not report.notes
    assert report.train.rows_per_class == (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    assert dataset.image_shape == (28, 28)
    assert dataset.sha256 == "3f9b095e08f7c5cc69b1d04a37027142c4e435c2674c068a8fb05d94dd33a96d"
