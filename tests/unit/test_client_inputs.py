"""How what callers give becomes tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelport import InputError, SignatureInfo, TensorInfo, tensors
from modelport._inputs import named_arrays, needs_signature, parts, request, row_count
from modelport._options import Target
from modelport.v1 import tensor_pb2

TARGET = Target(model="m")


def one_input(dtype: str) -> SignatureInfo:
    spec = TensorInfo(name="x", dtype=dtype, shape=(None,))
    return SignatureInfo(name="serving_default", inputs=(spec,), outputs=(), batched=True)


def sent(value: object, dtype: str) -> Any:
    array = named_arrays(value, one_input(dtype))["x"]
    return tensors.decode(array) if isinstance(array, tensor_pb2.Tensor) else array


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        ([1, 2], "uint8", np.array([1, 2], np.uint8)),
        ([[1], [2]], "float32", np.array([[1], [2]], np.float32)),
        ([1, 2.5], "float16", np.array([1, 2.5], np.float16)),
        ([True, False], "bool", np.array([True, False])),
        (7, "int64", np.array(7)),
        ([], "int32", np.array([], np.int32)),
        ([2**64 - 1], "uint64", np.array([2**64 - 1], np.uint64)),
        ([float("nan"), float("inf")], "float32", np.array([np.nan, np.inf], np.float32)),
        ((1, 2), "int8", np.array([1, 2], np.int8)),
    ],
)
def test_lists_become_what_the_signature_asks_for(value: object, dtype: str, expected: np.ndarray[Any, Any]) -> None:
    array = sent(value, dtype)
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        ([256], "uint8", "0 to 255; 256 does not fit"),
        ([-1], "uint64", "-1 does not fit"),
        ([2**63, -1], "int64", "does not fit"),
        ([2**70], "int64", "does not fit"),
        ([1.5], "int32", "takes int32, and the list holds 'float'"),
        ([True], "int32", "holds 'bool'"),
        ([1], "bool", "holds 'int'"),
        (["a"], "float32", "holds 'str'"),
        ([1e39], "float32", "does not fit"),
        ([1e6], "float16", "does not fit"),
        ([3.5e38], "bfloat16", "does not fit"),
        ([[1], [2, 3]], "float32", "differ in length"),
        ([[1], [2, 3]], "int32", "differ in length"),
        ([["a"], ["b", "c"]], "string", "differ in length"),
        ([1], "string", "takes text or bytes, not int"),
    ],
)
def test_lists_that_do_not_fit_are_refused(value: object, dtype: str, text: str) -> None:
    with pytest.raises(InputError, match="input 'x'") as caught:
        sent(value, dtype)
    assert text in str(caught.value)


def test_texts_and_bytes_become_strings() -> None:
    message = request({"x": sent(["é", b"\xff"], "string")}, TARGET)
    assert tensors.decode(message.inputs[0]).tolist() == ["é".encode(), b"\xff"]


@given(st.lists(st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126)))
def test_bfloat16_is_rounded_as_ml_dtypes_does(values: list[float]) -> None:
    import ml_dtypes

    expected = np.array(values, np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(sent(values, "bfloat16").astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float64", "int8", "uint16", ">f4"])
def test_arrays_keep_their_type(dtype: str) -> None:
    array = np.array([1, 2], dtype)
    assert sent(array, "float32") is array
    assert sent([array[0], array[1]], "float32").dtype == array.dtype.newbyteorder("=")


def test_a_dict_of_arrays_needs_no_signature() -> None:
    assert not needs_signature({"x": np.zeros(1)})
    assert needs_signature({"x": [0]})
    assert needs_signature(np.zeros(1))
    assert list(named_arrays({"x": np.zeros(1)}, None)) == ["x"]


def test_a_bare_array_needs_a_model_with_one_input() -> None:
    two = (TensorInfo(name="a", dtype="int8", shape=None), TensorInfo(name="b", dtype="int8", shape=None))
    signature = SignatureInfo(name="s", inputs=two, outputs=(), batched=False)
    with pytest.raises(InputError, match=r"has 2 inputs \(a, b\): give a dict"):
        named_arrays(np.zeros(1), signature)
    with pytest.raises(InputError, match="no input 'c'"):
        named_arrays({"c": [1]}, signature)
    with pytest.raises(InputError, match="no text"):
        named_arrays({1: np.zeros(1)}, signature)


def test_what_has_no_type_on_the_wire_is_refused() -> None:
    with pytest.raises(InputError, match="input 'x': arrays of complex128"):
        request({"x": np.zeros(1, complex)}, TARGET)
    with pytest.raises(InputError, match="input 'x'"):
        request({"x": np.array([None])}, TARGET)


@given(st.integers(1, 500), st.integers(0, 40), st.integers(5000, 40000))
def test_parts_join_to_the_whole_and_fit(rows: int, width: int, limit: int) -> None:
    arrays: dict[str, Any] = {"a": np.arange(rows * width, dtype=np.float32).reshape(rows, width), "b": np.arange(rows)}
    pieces = list(parts(arrays, limit))
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.concatenate([piece[name] for piece in pieces]), array)
    assert all(request(piece, TARGET).ByteSize() <= limit for piece in pieces)
    assert all(len(piece["b"]) for piece in pieces)


def test_parts_of_strings_fit_though_rows_differ() -> None:
    array = np.array([b"x"] * 50 + [b"y" * 3000] * 10 + [b"z"] * 50, object)
    pieces = list(parts({"x": array}, 8000))
    assert np.concatenate([piece["x"] for piece in pieces]).tolist() == array.tolist()
    assert all(request(piece, TARGET).ByteSize() <= 8000 for piece in pieces)


def test_rows_must_agree() -> None:
    with pytest.raises(InputError, match="'a' has 1, 'b' has 2"):
        row_count({"a": np.zeros(1), "b": np.zeros(2)})
    with pytest.raises(InputError, match="single value"):
        row_count({"a": np.zeros(())})
