from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modelport_server.gates import prediction_log_pb2 as pb
from modelport_server.gates._records import RecordError, crc32c, records
from modelport_server.gates.warmup_requests import WarmUpRequestsError, read_warmup_log, read_warmup_requests
from tests.support.warmup_files import ARRAYS, framed, log_of

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def by_tensorflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of ``tests.support.warmup_files``."""
    path = tmp_path_factory.mktemp("warm-up") / "requests"
    command = [sys.executable, "-m", "tests.support.warmup_files", str(path)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    return path


def test_the_checksum_is_that_of_rfc_3720() -> None:
    assert crc32c(b"") == 0
    assert crc32c(b"a") == 0xC1D04330
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_what_tensorflow_writes(by_tensorflow: Path) -> None:
    log = read_warmup_log(by_tensorflow)
    assert log.skipped == 1
    (first, arrays), (second, others) = log.requests
    assert (first, second) == ("serving_default", "other")
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype, name
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    np.testing.assert_array_equal(others["short"], np.array([1, 2, 2, 2, 2], np.float32))
    np.testing.assert_array_equal(others["unset"], np.zeros(2, np.int32))
    assert others["words"].tolist() == [b"a", b"b", b"b", b"b"]
    assert read_warmup_requests(by_tensorflow)[1][0] == "other"


def test_any_flipped_byte_is_noticed(by_tensorflow: Path, tmp_path: Path) -> None:
    data = by_tensorflow.read_bytes()
    path = tmp_path / "damaged"
    for index in [*range(0, len(data), len(data) // 40), len(data) - 1]:
        path.write_bytes(data[:index] + bytes([data[index] ^ 0x10]) + data[index + 1 :])
        with pytest.raises(WarmUpRequestsError, match=r"warm-up request [123] can't be used: ") as caught:
            read_warmup_requests(path)
        assert "\n" not in str(caught.value)


def test_a_file_that_was_cut(by_tensorflow: Path) -> None:
    data = by_tensorflow.read_bytes()
    assert len(list(records(data))) == 3
    for end in (1, 11, 12, 500, len(data) - 1):
        with pytest.raises(RecordError):
            list(records(data[:end]))


def test_no_file_means_no_requests(tmp_path: Path) -> None:
    assert read_warmup_requests(tmp_path / "none") == []
    (tmp_path / "empty").write_bytes(b"")
    assert read_warmup_requests(tmp_path / "empty") == []
    for path in (tmp_path, tmp_path / "empty" / "requests"):
        with pytest.raises(WarmUpRequestsError, match="can't be read"):
            read_warmup_requests(path)


def test_what_the_storage_fails_at_says_nothing_about_the_version(tmp_path: Path) -> None:
    (tmp_path / "requests").symlink_to("requests")
    with pytest.raises(OSError, match="symbolic links"):
        read_warmup_requests(tmp_path / "requests")


Edit = Callable[[pb.TensorProto], object]


def _sized(*dims: int) -> Edit:
    def edit(tensor: pb.TensorProto) -> None:
        del tensor.tensor_shape.dim[:]
        for size in dims:
            tensor.tensor_shape.dim.add(size=size)

    return edit


def _with(**fields: object) -> Edit:
    def edit(tensor: pb.TensorProto) -> None:
        tensor.MergeFrom(pb.TensorProto(**fields))  # type: ignore[arg-type]

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_with(dtype=8), "input 'x' has the type 8, which can't be sent"),
        (_with(tensor_shape=pb.TensorProto.Shape(unknown_rank=True)), "has no shape"),
        (_with(tensor_content=b"123"), "input 'x' float32 .2. takes 8 bytes, got 3"),
        (_with(float_val=[1, 2, 3]), "input 'x' has 3 values for a shape of 2"),
        (_sized(-1), "negative dimension"),
        (_sized(*[1] * 33), "33 dimensions"),
        (_sized(1 << 40), "more than 64 MiB"),
        (_sized(1 << 23, 1), "more than 1 MiB"),
    ],
)
def test_what_no_caller_can_send(tmp_path: Path, edit: Edit, message: str) -> None:
    tensor = pb.TensorProto(dtype=1)
    tensor.tensor_shape.dim.add(size=2)
    edit(tensor)
    path = tmp_path / "requests"
    path.write_bytes(framed(log_of({"x": tensor})))
    limits = {"max_bytes": 1 << 20} if "1 MiB" in message else {}
    with pytest.raises(WarmUpRequestsError, match=message):
        read_warmup_requests(path, **limits)


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "requests"
    path.write_bytes(framed(*[log_of({})] * 3))
    assert len(read_warmup_requests(path, max_requests=3)) == 3
    with pytest.raises(WarmUpRequestsError, match="warm-up request 3 can't be used: more than 2 are not allowed"):
        read_warmup_requests(path, max_requests=2)
    with pytest.raises(WarmUpRequestsError, match="more than 0 MiB: keep fewer"):
        read_warmup_requests(path, max_bytes=10)


def test_a_record_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "requests"
    path.write_bytes(framed(log_of({}), b"\xff\xff\xff"))
    with pytest.raises(WarmUpRequestsError, match="warm-up request 2 can't be used: it is no PredictionLog"):
        read_warmup_requests(path)
