from __future__ import annotations

import contextlib
import io
import math
import zipfile
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelport.tensors import DTYPES, bfloat16_from_bits
from modelport_registry import (
    JSON,
    FileEntry,
    Golden,
    IntegrityError,
    Lineage,
    Manifest,
    SignatureSpec,
    TensorSpec,
)
from modelport_registry._golden import dump_golden, load_golden

names = st.text(min_size=1, max_size=20)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(shapes)
    if dtype.storage is None:
        items = draw(st.lists(st.binary(max_size=6), min_size=math.prod(shape), max_size=math.prod(shape)))
        strings = np.empty(math.prod(shape), dtype=object)
        strings[:] = items
        return strings.reshape(shape)
    array: np.ndarray[Any, Any] = draw(hnp.arrays(dtype.storage, shape))
    return bfloat16_from_bits(array) if dtype.name == "bfloat16" else array


tensors = st.dictionaries(names, arrays(), max_size=3)
tolerances = st.floats(min_value=0, allow_infinity=False, allow_nan=False)
goldens = st.lists(st.builds(Golden, names, tensors, tensors, tolerances, tolerances), max_size=3)


def _same(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return left.tolist() == right.tolist() if left.dtype == object else left.tobytes() == right.tobytes()


@given(goldens)
def test_golden_examples_come_back_bit_by_bit(golden: list[Golden]) -> None:
    data = dump_golden(golden)
    assert data == dump_golden(golden)
    loaded = load_golden(data)
    assert len(loaded) == len(golden)
    for one, other in zip(golden, loaded, strict=True):
        assert (one.signature, one.rtol, one.atol) == (other.signature, other.rtol, other.atol)
        for mine, theirs in ((one.inputs, other.inputs), (one.outputs, other.outputs)):
            assert mine.keys() == theirs.keys()
            assert all(_same(array, theirs[name]) for name, array in mine.items())


@given(goldens)
def test_golden_files_are_plain_npz(golden: list[Golden]) -> None:
    with np.load(io.BytesIO(dump_golden(golden)), allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)


@given(goldens, st.data())
def test_damaged_golden_examples_are_a_clear_error_or_harmless(golden: list[Golden], data: st.DataObject) -> None:
    whole = bytearray(dump_golden(golden))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(IntegrityError):
        load_golden(bytes(whole))


@given(goldens, st.integers(min_value=1))
def test_cut_golden_examples_are_refused(golden: list[Golden], cut: int) -> None:
    whole = dump_golden(golden)
    with pytest.raises(IntegrityError):
        load_golden(whole[: -min(cut, len(whole))])


json: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
dimensions = st.none() | st.integers(0, 2**40)
dtypes = st.sampled_from(["float32", "string", "complex64"])
specs = st.builds(
    TensorSpec,
    names,
    st.sampled_from(["float32", "string", "complex64"]),
    st.none() | st.tuples(dimensions, dimensions),
)
spec_lists = st.lists(specs, max_size=3).map(tuple)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
files = st.lists(
    st.builds(FileEntry, st.from_regex(r"[a-zé ]{1,5}(/[a-z]{1,5}){0,2}", fullmatch=True), st.integers(0), digests),
    max_size=4,
    unique_by=lambda entry: entry.path,
).map(tuple)
parameters: st.SearchStrategy[dict[str, JSON]] = st.dictionaries(names, json, max_size=3)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    signatures = draw(st.lists(names, max_size=2, unique=True))
    finite = st.floats(allow_nan=False, allow_infinity=False)
    return Manifest(
        format=1,
        model=draw(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,63}", fullmatch=True)),
        version=draw(st.integers(1, 2**63 - 1)),
        created=draw(st.datetimes(timezones=st.just(UTC))),
        publisher=draw(st.text(max_size=9)),
        framework=draw(st.dictionaries(names, st.text(max_size=5), max_size=2)),
        files=draw(files),
        signatures={name: SignatureSpec(name, draw(spec_lists), draw(spec_lists)) for name in signatures},
        golden=draw(st.integers(0, 2**40)),
        metrics=draw(st.dictionaries(names, finite, max_size=3)),
        lineage=Lineage(draw(st.none() | st.text()), draw(parameters), draw(st.none() | st.text()), None),
        tags=tuple(draw(st.lists(names, max_size=3))),
    )


@given(manifests())
def test_manifests_come_back_as_they_were(manifest: Manifest) -> None:
    text = manifest.to_json()
    assert Manifest.from_json(text) == Manifest.from_json(text.encode()) == manifest
    assert Manifest.from_json(text).to_json() == text


@given(manifests(), st.data())
def test_any_changed_bit_of_a_manifest_is_noticed(manifest: Manifest, data: st.DataObject) -> None:
    whole = bytearray(manifest.to_json().encode())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(IntegrityError):
        Manifest.from_json(bytes(whole))


@given(st.binary(max_size=200))
def test_any_bytes_are_no_manifest_and_no_golden_examples(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        Manifest.from_json(data)
    with pytest.raises(IntegrityError):
        load_golden(data)


def test_golden_examples_that_would_unpack_to_more_are_refused() -> None:
    golden = [Golden("f", {"x": np.zeros((1000, 1000), np.uint8)}, {"y": np.zeros(1)})]
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(dump_golden(golden))) as plain,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(IntegrityError, match="compressed"):
        load_golden(buffer.getvalue())


def test_an_array_whose_header_claims_more_than_there_is_is_refused() -> None:
    data = dump_golden([Golden("f", {"x": np.zeros(3, np.uint8)}, {})])
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as plain, zipfile.ZipFile(buffer, "w") as lying:
        for name in plain.namelist():
            lying.writestr(name, plain.read(name).replace(b"(3,)", b"(9999999999999,)"))
    with pytest.raises(IntegrityError):
        load_golden(buffer.getvalue())


def test_manifests_of_the_past_and_future() -> None:
    created = datetime(2000, 1, 1, tzinfo=UTC)
    manifest = Manifest(1, "m", 1, created, "", {}, (), {}, 0, {}, Lineage(), ())
    assert Manifest.from_json(manifest.to_json()).created == created
