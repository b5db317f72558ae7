"""Tensors on the wire and on their way through the server: nothing is lost, whatever they hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes  # noqa: TID253 - the tests need not do without it
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from modelport.tensors import (
    DTYPES,
    DTYPES_BY_NUMBER,
    MAX_RANK,
    DType,
    TensorError,
    array_from_bytes,
    check_size,
    decode,
    encode,
    pack_strings,
    string_offsets,
    unpack_strings,
)
from modelport.v1 import tensor_pb2
from modelport_server.engines import _messages as messages
from modelport_server.engines._memory import Region
from modelport_server.errors import InvalidCallError
from modelport_server.rpc.codec import parse_predict, parse_stream, to_request
from modelport_server.tensors import Gathered, RawTensor, cut_rows, gather_rows, join_rows, owned

NUMBERS = [dtype for dtype in DTYPES.values() if not dtype.is_string]
_shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def _arrays(draw: st.DrawFn, dtype: DType, shapes: st.SearchStrategy[tuple[int, ...]] = _shapes) -> NDArray[Any]:
    """Any array of a type, every bit pattern included."""
    shape = draw(shapes)
    count = math.prod(shape)
    if dtype.is_string:
        items = draw(st.lists(st.binary(max_size=5), min_size=count, max_size=count))
        array = np.empty(count, object)
        array[:] = items
        return array.reshape(shape)
    if dtype.name == "bool":
        return draw(hnp.arrays(np.bool_, shape))
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    kind = ml_dtypes.bfloat16 if dtype.name == "bfloat16" else np.dtype(dtype.name)
    return np.frombuffer(raw, kind).reshape(shape)


def _same(left: NDArray[Any], right: NDArray[Any]) -> bool:
    if left.dtype.hasobject:
        return left.shape == right.shape and left.tolist() == right.tolist()
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_an_array_comes_back_bit_for_bit(dtype: DType, data: st.DataObject) -> None:
    array = data.draw(_arrays(dtype))
    message = tensor_pb2.Tensor.FromString(encode("x", array).SerializeToString())
    assert (message.name, message.dtype, tuple(message.shape)) == ("x", dtype.number, array.shape)
    assert _same(decode(message), array)


@given(hnp.arrays(np.int32, (3, 4)))
def test_order_and_byte_order_of_memory_do_not_matter(array: NDArray[np.int32]) -> None:
    for odd in (np.asfortranarray(array), array.T.copy().T, array[::-1, ::2], array.astype(">i4")):
        np.testing.assert_array_equal(decode(encode("x", odd)), odd)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), max_size=5))
def test_text_is_sent_as_utf8(items: list[str]) -> None:
    decoded = decode(encode("x", np.array(items, dtype=object)))
    assert [item.decode() for item in decoded.tolist()] == items


@given(st.lists(st.binary(max_size=8), max_size=20))
def test_strings_come_back(items: list[bytes]) -> None:
    assert unpack_strings(pack_strings(items), len(items)) == items


@given(st.binary(max_size=64), st.integers(0, 20))
def test_offsets_are_legal_or_refused(data: bytes, count: int) -> None:
    try:
        check_size(DTYPES["string"], (count,), len(data))
        offsets = string_offsets(data, count)
    except TensorError:
        return
    assert offsets[0] == 0
    assert sum(map(len, unpack_strings(data, count))) == len(data) - 4 * (count + 1)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@given(
    st.lists(st.one_of(st.integers(0, 3), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, -1, -(2**63)])), max_size=5),
    st.binary(max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_any_claim_about_a_few_bytes_is_right_or_refused(dtype: DType, shape: list[int], data: bytes) -> None:
    try:
        array = array_from_bytes(dtype, shape, data)
    except TensorError as error:
        text = str(error)
    else:
        text = ""
        assert list(array.shape) == shape
        assert array.size * dtype.itemsize <= len(data)
    assert len(text) < 500


def test_too_many_dimensions_are_refused() -> None:
    decode(encode("x", np.zeros((1,) * MAX_RANK, np.float32)))
    with pytest.raises(TensorError, match="255"):
        array_from_bytes(DTYPES["float32"], (1,) * 255, bytes(4))


@pytest.mark.parametrize(
    "array", [np.zeros(1, np.complex64), np.zeros(1, "datetime64[s]"), np.array([1, "a"], object)], ids=str
)
def test_arrays_that_have_no_type_on_the_wire(array: NDArray[Any]) -> None:
    with pytest.raises(TensorError):
        encode("x", array)


def test_numbers_of_types_are_the_protos() -> None:
    assert set(DTYPES_BY_NUMBER) == set(tensor_pb2.DataType.values()) - {0}


# ---- through the server: rows are cut and joined without being looked at

_row_shapes = st.tuples(st.integers(1, 7), st.integers(0, 3))


def _raw(array: NDArray[Any]) -> RawTensor:
    message = encode("x", array)
    return RawTensor("x", DTYPES_BY_NUMBER[message.dtype], tuple(message.shape), message.data)


def _array(tensor: RawTensor) -> NDArray[Any]:
    return array_from_bytes(tensor.dtype, tensor.shape, tensor.data)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rows_that_are_cut_and_joined_are_the_same_rows(dtype: DType, data: st.DataObject) -> None:
    array = data.draw(_arrays(dtype, _row_shapes))
    tensor = _raw(array)
    rows = len(array)
    cuts = sorted(data.draw(st.sets(st.integers(1, rows), max_size=4)) | {0, rows})
    pieces = [cut_rows(tensor, start, stop) for start, stop in itertools.pairwise(cuts)]
    for piece, start, stop in zip(pieces, cuts, cuts[1:], strict=False):
        assert _same(_array(piece), array[start:stop])
    assert _same(_array(join_rows(pieces)), array)
    again = join_rows([join_rows(pieces), *pieces])
    assert _same(_array(again), np.concatenate([array, array]))
    assert _same(_array(_in_shared_memory([gather_rows(pieces), tensor])[0]), array)


def _in_shared_memory(tensors: Sequence[RawTensor | Gathered]) -> tuple[RawTensor, ...]:
    region = Region.create("test")
    try:
        entries, size = messages.describe(tensors)
        messages.write(region, tensors, entries, size)
        return tuple(owned(tensor) for tensor in messages.read(region, entries, size))
    finally:
        region.close()


def test_rows_of_numbers_are_gathered_without_a_copy() -> None:
    tensors = [_raw(np.full((rows, 3), rows, np.uint8)) for rows in (1, 2, 5)]
    assert gather_rows(tensors).pieces == tuple(tensor.data for tensor in tensors)
    assert gather_rows(tensors).shape == (8, 3)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_request_or_the_callers_mistake(raw: bytes) -> None:
    said: list[str] = []
    try:
        to_request(parse_predict(raw), len(raw))
    except InvalidCallError as error:
        said.append(str(error))
    try:
        to_request(parse_stream(raw).request, len(raw))
    except InvalidCallError as error:
        said.append(str(error))
    assert all(len(text.encode()) < 1000 for text in said)
