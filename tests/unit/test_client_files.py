"""Files in and out of ``modelport predict``: IDX, arrays, images; tables, arrays, text."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport import InputError, TensorInfo
from modelport._cli_inputs import SourceOptions, batch_rows, open_sources, whole
from modelport._cli_outputs import format_of, open_sink
from modelport.idx import idx_chunks, is_idx, read_header, read_idx

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
IMAGES = SourceOptions(inputs=[TensorInfo(name="images", dtype="uint8", shape=(None, 4, 3))])
OTHER_SHAPES = {"tall.npy": (9, 5, 3), "flat.npz": (9, 12), "wide-idx3-ubyte": (9, 4, 4)}
FREE = SourceOptions(inputs=[TensorInfo(name="x", dtype="float32", shape=None)])


def idx_bytes(array: np.ndarray[Any, Any]) -> bytes:
    code = CODES[array.dtype.str[1:]]
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(CODES)), st.integers(0, 20), st.booleans(), st.integers(0, 22), st.integers(0, 22))
def test_idx_rows_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, rows: int, zipped: bool, start: int, stop: int
) -> None:
    array = np.arange(rows * 6).reshape(rows, 2, 3).astype(dtype)
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array))
    read = read_idx(path, start, stop)
    np.testing.assert_array_equal(read, array[start : max(start, stop)])
    assert read.dtype == array.dtype
    assert is_idx(path)
    assert read_header(path).shape == (rows, 2, 3)
    np.testing.assert_array_equal(np.concatenate([*idx_chunks(path, 7), array[:0]]), array)


WHOLE = idx_bytes(np.zeros((3, 2), np.uint8))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "begins with nothing"),
        (b"\0\0\x08", "not an IDX file"),
        (b"\0\0\x07\1\0\0\0\0", "not an IDX file"),
        (b"\0\0\x08\0", "not an IDX file"),
        (WHOLE[:9], "ends within its header"),
        (WHOLE[:-1], "promises 18 bytes and the file has 17"),
        (WHOLE + b"x", "promises 18 bytes and the file has 19"),
        (b"\0\0\x08\x02" + b"\xff" * 8, "promises"),
        (gzip.compress(WHOLE, mtime=0)[:-12], "can't be read"),
        (gzip.compress(WHOLE[:-3], mtime=0), "ends within row 1"),
        (b"\x1f\x8bnonsense", "can't be read"),
    ],
)
def test_idx_files_that_are_none_or_damaged_get_one_line(tmp_path: Path, data: bytes, text: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_idx(path)
    assert text in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_idx_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_idx(tmp_path / "none")
    assert not is_idx(tmp_path / "none")


def read_all(paths: list[Path], options: SourceOptions, rows: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    source = open_sources(paths, options)
    chunks = list(source.chunks(rows))
    assert all(len(array) <= rows for chunk in chunks for array in chunk.values())
    joined = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    assert all(len(array) == source.rows for array in joined.values())
    return joined


def test_every_kind_of_file_gives_its_rows(tmp_path: Path) -> None:
    array = np.arange(10 * 12, dtype=np.uint8).reshape(10, 4, 3)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "b.npz", images=array, other=np.zeros(3))
    np.savez_compressed(tmp_path / "c.npz", images=array)
    (tmp_path / "d-idx").write_bytes(idx_bytes(array))
    (tmp_path / "e.gz").write_bytes(gzip.compress(idx_bytes(array)))
    paths = [tmp_path / name for name in ("a.npy", "b.npz", "c.npz", "d-idx", "e.gz")]
    for path in paths:
        np.testing.assert_array_equal(read_all([path], IMAGES)["images"], array)
    assert len(read_all(paths, IMAGES)["images"]) == 50
    assert batch_rows(open_sources(paths, IMAGES)) == 1024
    assert open_sources([paths[0]], IMAGES).row_bytes == 12


def image(path: Path, width: int = 3, height: int = 4, value: int = 7) -> Path:
    from PIL import Image

    Image.new("RGB", (width, height), (value, value, value)).save(path)
    return path


def test_a_folder_of_images(tmp_path: Path) -> None:
    for number, suffix in enumerate(["png", "jpg", "PNG", "jpeg"]):
        image(tmp_path / f"{number}.{suffix}", value=number)
    (tmp_path / "notes.txt").write_text("not an image")
    array = read_all([tmp_path], IMAGES)["images"]
    assert array[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert array.dtype == np.uint8
    in_colour = SourceOptions(inputs=[TensorInfo(name="i", dtype="uint8", shape=(None, 4, 3, 3))])
    assert read_all([tmp_path], in_colour)["i"].shape == (4, 4, 3, 3)
    free = SourceOptions(inputs=[TensorInfo(name="i", dtype="uint8", shape=(None, None, None, 1))])
    assert read_all([tmp_path / "0.png"], free)["i"].shape == (1, 4, 3, 1)


def test_an_image_of_another_size_is_named_or_resized(tmp_path: Path) -> None:
    path = image(tmp_path / "big.png", 9, 8)
    with pytest.raises(InputError, match=r"big.png: is 8 x 9 pixels, and the model takes 4 x 3; --resize"):
        read_all([path], IMAGES)
    resizing = SourceOptions(inputs=IMAGES.inputs, resize=True)
    assert read_all([path], resizing)["images"].shape == (1, 4, 3)


def make_bad(folder: Path, kind: str) -> Path:
    path = folder / kind
    if kind == "none":
        return path
    if kind == "empty":
        path.mkdir()
    elif kind.endswith("objects.npz"):
        np.savez(path, images=np.array([object()]))
    elif kind == "fortran.npz":
        np.savez(path, images=np.asfortranarray(np.zeros((4, 4, 3), np.uint8)))
    elif kind in OTHER_SHAPES:
        array = np.zeros(OTHER_SHAPES[kind], np.uint8)
        if kind.endswith(".npy"):
            np.save(path, array)
        elif kind.endswith(".npz"):
            np.savez(path, images=array)
        else:
            path.write_bytes(idx_bytes(array))
    elif kind == "scalar.npy":
        np.save(path, np.array(1))
    elif kind == "nokey.npz":
        np.savez(path, pictures=np.zeros(1))
    elif kind == "short.npz":
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((100, 4, 3), np.uint8))
        import zipfile

        with zipfile.ZipFile(path, "w") as file:
            file.writestr("images.npy", buffer.getvalue()[:-50])
    else:
        path.write_bytes(b"nonsense")
    return path


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("none", "no such file or folder"),
        ("empty", "has no .png"),
        ("nonsense.npy", "can't be read"),
        ("nonsense.npz", "can't be read"),
        ("nonsense.png", "can't be read"),
        ("nonsense.txt", "not an .npy, .npz, IDX, PNG or JPEG"),
        ("objects.npz", "holds Python objects"),
        ("fortran.npz", "Fortran order"),
        ("scalar.npy", "single value"),
        ("tall.npy", "has shape [9, 5, 3], and input images takes [any, 4, 3]"),
        ("flat.npz", "the array 'images' has shape [9, 12], and input images takes [any, 4, 3]"),
        ("wide-idx3-ubyte", "has shape [9, 4, 4], and input images takes [any, 4, 3]"),
        ("nokey.npz", "has no array 'images', which the model takes; it has pictures"),
        ("short.npz", "the array ends early"),
    ],
)
def test_bad_files_get_one_line_that_names_them(tmp_path: Path, kind: str, text: str) -> None:
    path = make_bad(tmp_path, kind)
    with pytest.raises(InputError) as caught:
        read_all([path], IMAGES)
    assert text in str(caught.value)
    assert kind in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_with_several_inputs_take_an_npz_or_a_name(tmp_path: Path) -> None:
    specs = [TensorInfo(name="a", dtype="int8", shape=(None,)), TensorInfo(name="b", dtype="int8", shape=(None,))]
    np.save(tmp_path / "a.npy", np.zeros(3, np.int8))
    np.savez(tmp_path / "ab.npz", a=np.zeros(3), b=np.ones(3))
    np.savez(tmp_path / "odd.npz", a=np.zeros(3), b=np.ones(4))
    np.savez(tmp_path / "wide.npz", a=np.zeros(3), b=np.ones((3, 2)))
    options = SourceOptions(inputs=specs)
    assert set(read_all([tmp_path / "ab.npz"], options)) == {"a", "b"}
    with pytest.raises(InputError, match=r"the array 'b' has shape \[3, 2\], and input b takes \[any\]"):
        open_sources([tmp_path / "wide.npz"], options)
    free = SourceOptions(inputs=[TensorInfo(name="b", dtype="int8", shape=(None, None))])
    assert read_all([tmp_path / "wide.npz"], free)["b"].shape == (3, 2)
    with pytest.raises(InputError, match=r"2 inputs \(a, b\): give an .npz, or say --input-name"):
        open_sources([tmp_path / "a.npy"], options)
    with pytest.raises(InputError, match="a 3, b 4"):
        open_sources([tmp_path / "odd.npz"], options)
    with pytest.raises(InputError, match="no input 'c'"):
        open_sources([tmp_path / "a.npy"], SourceOptions(inputs=specs, input_name="c"))
    assert set(read_all([tmp_path / "a.npy"], SourceOptions(inputs=specs, input_name="b"))) == {"b"}
    with pytest.raises(InputError, match=r"images make uint8"):
        open_sources([image(tmp_path / "i.png")], FREE)


def test_a_whole_call_s_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array(3.0))
    np.savez(tmp_path / "x.npz", x=np.zeros(2))
    assert whole([tmp_path / "x.npy"], FREE)["x"].shape == ()
    assert whole([tmp_path / "x.npz"], FREE)["x"].shape == (2,)
    with pytest.raises(InputError, match="does not take rows"):
        whole([tmp_path / "x.npy"] * 2, FREE)
    with pytest.raises(InputError, match="does not take rows"):
        whole([image(tmp_path / "i.png")], FREE)


OUTPUTS: dict[str, Any] = {
    "p": np.array([[0.1, 0.9], [0.25, np.nan], [1, -np.inf]], np.float32),
    "c": np.array([1, 2, 3], np.int64),
    "t": np.array([b"a", "é".encode(), b"\xff"], object),
}


def written(path: Path | None, kind: str, outputs: dict[str, Any], *, has_rows: bool = True) -> None:
    with open_sink(path, kind, has_rows=has_rows) as sink:
        if not has_rows:
            sink.write(outputs)
            return
        for start, stop in itertools.pairwise([0, 1, 1, 3]):
            sink.write({name: array[start:stop] for name, array in outputs.items()})


def test_arrays_are_written_piece_by_piece(tmp_path: Path) -> None:
    written(tmp_path / "a.npy", "npy", {"p": OUTPUTS["p"]})
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), OUTPUTS["p"])
    numbers = {"p": OUTPUTS["p"], "c": OUTPUTS["c"]}
    written(tmp_path / "a.npz", "npz", numbers)
    with np.load(tmp_path / "a.npz") as file:
        assert set(file) == {"p", "c"}
        for name, array in numbers.items():
            np.testing.assert_array_equal(file[name], array)
            assert file[name].dtype == array.dtype
    written(tmp_path / "b.npy", "npy", {"p": np.float32(3)}, has_rows=False)
    assert np.load(tmp_path / "b.npy") == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "a.npz", "b.npy"]


def test_bfloat16_is_written_as_float32(tmp_path: Path) -> None:
    import ml_dtypes

    written(tmp_path / "a.npy", "npy", {"p": np.array([1, 2, 3], ml_dtypes.bfloat16)})
    assert np.load(tmp_path / "a.npy").dtype == np.float32
    written(tmp_path / "a.jsonl", "jsonl", {"p": np.array([1, 2, 3], ml_dtypes.bfloat16)})
    assert (tmp_path / "a.jsonl").read_text() == '{"p":1.0}\n{"p":2.0}\n{"p":3.0}\n'


def test_json_lines_are_json(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", "jsonl", OUTPUTS)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == [
        {"p": [0.1, 0.9], "c": 1, "t": "a"},
        {"p": [0.25, "NaN"], "c": 2, "t": "é"},
        {"p": [1.0, "-Infinity"], "c": 3, "t": {"base64": "/w=="}},
    ]


def test_csv_has_a_column_an_element(tmp_path: Path) -> None:
    written(tmp_path / "a.csv", "csv", {"p": np.array([[0.5, 1], [2, 3], [4, 5]], np.float32), "c": OUTPUTS["c"]})
    assert (tmp_path / "a.csv").read_text() == "p_0,p_1,c\n0.5,1.0,1\n2.0,3.0,2\n4.0,5.0,3\n"


def test_a_table_shows_the_first_rows(capsys: pytest.CaptureFixture[str]) -> None:
    written(None, "table", OUTPUTS)
    shown = capsys.readouterr().out
    for text in ("row", "p", "c", "t", "0.25", "é", "\\xff"):
        assert text in shown


def test_text_goes_to_stdout_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    written(None, "jsonl", {"c": OUTPUTS["c"]})
    assert capsys.readouterr().out == '{"c":1}\n{"c":2}\n{"c":3}\n'


@pytest.mark.parametrize(
    ("kind", "outputs", "text"),
    [
        ("npy", OUTPUTS, "say --outputs, or write .npz"),
        ("npy", {"t": OUTPUTS["t"]}, "texts go into .jsonl or .csv"),
        ("npz", OUTPUTS, "output t: texts go into"),
    ],
)
def test_what_a_format_can_not_hold_leaves_no_file(
    tmp_path: Path, kind: str, outputs: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        written(tmp_path / "out", kind, outputs)
    assert list(tmp_path.iterdir()) == []


def test_an_error_half_way_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("old")

    def fail() -> None:
        with open_sink(path, "jsonl", has_rows=True) as sink:
            sink.write({"c": OUTPUTS["c"]})
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_shapes_that_change_do_not_fit_an_array(tmp_path: Path) -> None:
    def write(kind: str) -> None:
        with open_sink(tmp_path / "out", kind, has_rows=True) as sink:
            sink.write({"p": np.zeros((1, 2))})
            sink.write({"p": np.zeros((1, 3))})

    for kind in ("npy", "csv"):
        with pytest.raises(InputError, match="shapes differ"):
            write(kind)


def test_formats() -> None:
    assert format_of(None, None) == "table"
    assert format_of(Path("a.JSONL"), None) == "jsonl"
    assert format_of(Path("a.csv"), "npy") == "npy"
    with pytest.raises(InputError, match="say what to write with --format"):
        format_of(Path("a.xyz"), None)
    with pytest.raises(InputError, match="needs --output FILE"):
        written(None, "npz", OUTPUTS)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be written: No such file"):
        written(tmp_path / "none" / "a.npy", "npy", OUTPUTS)
