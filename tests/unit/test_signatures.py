"""What a call is told when its inputs do not fit the signature."""

from __future__ import annotations

import math

import pytest

from modelport.tensors import DTYPES
from modelport_registry import SignatureSpec, TensorSpec
from modelport_server.errors import InvalidCallError
from modelport_server.signatures import (
    arrange,
    batch_key,
    common_rows,
    empty_outputs,
    is_batchable,
    wanted_outputs,
)
from modelport_server.tensors import RawTensor

Shape = tuple[int | None, ...] | None


def _spec(inputs: dict[str, tuple[str, Shape]], outputs: dict[str, tuple[str, Shape]]) -> SignatureSpec:
    def specs(tensors: dict[str, tuple[str, Shape]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in tensors.items())

    return SignatureSpec(name="serving_default", inputs=specs(inputs), outputs=specs(outputs))


def _raw(name: str, dtype: str, *shape: int) -> RawTensor:
    kind = DTYPES[dtype]
    return RawTensor(name, kind, shape, bytes(math.prod(shape) * kind.itemsize))


SPEC = _spec({"a": ("float32", (None, 3)), "b": ("int32", (None,))}, {"y": ("float32", (None, 3))})


def test_inputs_come_in_the_signatures_order() -> None:
    a, b = _raw("a", "float32", 2, 3), _raw("b", "int32", 2)
    assert arrange(SPEC, [b, a]) == (a, b)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([_raw("a", "float32", 2, 3)], ["'b'", "serving_default", "missing"]),
        ([], ["'a'", "missing"]),
        ([_raw("a", "float64", 2, 3), _raw("b", "int32", 2)], ["'a'", "float32", "float64"]),
        ([_raw("a", "float32", 2, 4), _raw("b", "int32", 2)], ["'a'", "[?, 3]", "[2, 4]"]),
        ([_raw("a", "float32", 3), _raw("b", "int32", 2)], ["'a'", "[?, 3]", "[3]"]),
        ([_raw("a", "float32", 2, 3), _raw("a", "float32", 2, 3)], ["'a'", "twice"]),
        (
            [_raw("a", "float32", 2, 3), _raw("b", "int32", 2), _raw("c", "int32", 2)],
            ["'c'", "'a', 'b'", "serving_default"],
        ),
        ([_raw("a" * 10_000, "float32", 2, 3)], ["no input 'aaa"]),
    ],
)
def test_the_message_names_what_came_and_what_is_wanted(inputs: list[RawTensor], words: list[str]) -> None:
    with pytest.raises(InvalidCallError) as caught:
        arrange(SPEC, inputs)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_an_input_of_a_type_that_cant_be_sent_is_said_to_be_so() -> None:
    spec = _spec({"r": ("resource", ())}, {})
    with pytest.raises(InvalidCallError, match="resource"):
        arrange(spec, [])


def test_a_free_rank_takes_any_shape() -> None:
    spec = _spec({"x": ("float32", None)}, {"y": ("float32", None)})
    assert arrange(spec, [_raw("x", "float32")])
    assert arrange(spec, [_raw("x", "float32", 1, 2, 3)])
    assert not is_batchable(spec)


def test_inputs_that_disagree_on_rows() -> None:
    inputs = (_raw("a", "float32", 2, 3), _raw("b", "int32", 5))
    with pytest.raises(InvalidCallError, match="'a' and 'b' disagree on the number of rows: 2 and 5"):
        common_rows(SPEC, inputs)
    assert common_rows(SPEC, inputs[:1]) == 2


def test_rows_that_hold_nothing_are_bounded_because_they_cost_nothing_to_send() -> None:
    spec = _spec({"x": ("float32", (None, None))}, {"y": ("float32", (None, None))})
    assert common_rows(spec, [_raw("x", "float32", 1 << 16, 0)]) == 1 << 16
    with pytest.raises(InvalidCallError, match="without any element"):
        common_rows(spec, [_raw("x", "float32", 1 << 40, 0)])


@pytest.mark.parametrize(
    ("inputs", "outputs", "batchable"),
    [
        ({"x": (None, 3)}, {"y": (None,)}, True),
        ({"x": (None, None)}, {"y": (None, None)}, True),
        ({"x": (None, 3)}, {"y": (None, None)}, False),
        ({"x": (None, 3)}, {"y": ()}, False),
        ({"x": (8, 3)}, {"y": (8,)}, False),
        ({"x": ()}, {"y": ()}, False),
        ({}, {"y": (None,)}, False),
    ],
)
def test_which_signatures_can_share_a_batch(
    inputs: dict[str, Shape], outputs: dict[str, Shape], batchable: bool
) -> None:
    spec = _spec(
        {name: ("float32", shape) for name, shape in inputs.items()},
        {name: ("float32", shape) for name, shape in outputs.items()},
    )
    assert is_batchable(spec) is batchable


def test_calls_of_other_inner_shapes_do_not_share_a_batch() -> None:
    spec = _spec({"x": ("float32", (None, None))}, {"y": ("float32", (None, None))})
    keys = [batch_key(spec, [_raw("x", "float32", rows, width)]) for rows, width in [(1, 3), (2, 3), (1, 4)]]
    assert keys[0] == keys[1] != keys[2]


def test_no_rows_give_empty_outputs() -> None:
    spec = _spec({"x": ("float32", (None,))}, {"s": ("string", (None,)), "y": ("int8", (None, 4))})
    outputs = empty_outputs(spec)
    assert outputs is not None
    assert [(tensor.name, tensor.shape, bytes(tensor.data)) for tensor in outputs] == [
        ("s", (0,), bytes(4)),
        ("y", (0, 4), b""),
    ]
    assert empty_outputs(_spec({"x": ("float32", (None,))}, {"y": ("int8", (None, None))})) is None


def test_outputs_are_checked_by_name() -> None:
    assert wanted_outputs(SPEC, []) is None
    assert wanted_outputs(SPEC, ["y"]) == frozenset({"y"})
    with pytest.raises(InvalidCallError, match=r"has no output 'z'.*'y'"):
        wanted_outputs(SPEC, ["y", "z"])
