"""What outputs are like, row by row: in a few categories, and beside those of another version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelport.tensors import array_from_bytes
from modelport_server.tensors import RawTensor

Numbers = NDArray[np.float32] | NDArray[np.float64]

NON_FINITE = -(1 << 40)
"""The category of rows with NaN or infinity."""
MAX_ROWS = 256
"""A larger output is put into categories in its first rows."""
MAX_COMPARED_ROWS = 1024
"""A larger call is compared in its first rows."""
_MAX_CLASSES = 10_000
_MAX_ELEMENTS = 1 << 16
_STEP_BITS = 21
"""Of a float's 23 bits of mantissa, those that are dropped: 4 steps to a factor of 2."""
_SMALLEST = np.float32(1e-6)


def categories(tensor: RawTensor) -> list[int]:
    """Returns the category of each of the first rows of an output; nothing for one that has none.

    Scores (floats in two dimensions with at least two columns) have the column of the highest as their
    class, labels (whole numbers, one a row) themselves, other floats the size of a row's mean, in four steps
    to a factor of 2, with its sign. Rows with NaN or infinity are ``NON_FINITE``.
    """
    if tensor.dtype.is_string or not tensor.shape or not tensor.elements:
        return []
    rows = max(1, min(MAX_ROWS, tensor.shape[0], _MAX_ELEMENTS * tensor.shape[0] // tensor.elements))
    array = array_from_bytes(tensor.dtype, tensor.shape, tensor.data)[:rows]
    if array.dtype.kind in "iub":
        return [int(label) for label in array.ravel().tolist()] if array.size == rows else []
    return _of_floats(array if array.dtype == np.float64 else array.astype(np.float32, copy=False))


def _of_floats(array: Numbers) -> list[int]:
    """Returns the categories of an array's rows."""
    flat = array.reshape(len(array), -1)
    scores = array.ndim == 2 and 2 <= array.shape[1] <= _MAX_CLASSES
    found: list[int] = flat.argmax(axis=1).tolist() if scores else _steps(flat)
    # Zero times anything finite is zero: one sum tells whether there is anything else.
    with np.errstate(invalid="ignore"):
        if float(np.vdot(flat, np.zeros_like(flat))) == 0.0:
            return found
    finite: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(flat), axis=1)
    return [one if good else NON_FINITE for one, good in zip(found, finite.tolist(), strict=True)]


def _steps(flat: Numbers) -> list[int]:
    """Returns the size of each row's mean, numbered from the smallest to the largest."""
    with np.errstate(all="ignore"):
        means: NDArray[np.float32] = flat.mean(axis=1).astype(np.float32)
    sizes: NDArray[np.int32] = np.maximum(np.abs(means), _SMALLEST).view(np.int32) >> _STEP_BITS
    signed: list[int] = np.where(means < 0, -sizes, sizes).tolist()
    return signed


@dataclass(frozen=True, slots=True)
class Compared:
    """What a copy of a call came to on another version than the one that answered the call."""

    rows: int
    """How many of the call's rows ran."""
    engine_time_us: int
    """From its start to its end in the engine."""
    agreeing: Mapping[str, tuple[int, int]]
    """For each output of the answer, how many rows were compared, and how many of them are alike."""
    categories: Mapping[str, Sequence[int]]
    """The categories of each output's rows, see ``categories``; nothing where nobody asked for them."""
    answer_categories: Mapping[str, Sequence[int]]
    """The same of the answer that the call got."""


def agreeing_rows(left: RawTensor, right: RawTensor | None) -> tuple[int, int]:
    """Returns how many rows there are and how many are alike.

    Rows of scores (floats in two dimensions) are alike if the same column is the highest; other floats
    if every element is within 1% or 0.001; anything else if it is equal.
    """
    if right is None or left.shape != right.shape or left.dtype != right.dtype:
        return (left.shape[0] if left.shape else 1), 0
    first, second = (array_from_bytes(t.dtype, t.shape, t.data) for t in (left, right))
    if not first.shape:
        first, second = first[np.newaxis], second[np.newaxis]
    first, second = first[:MAX_COMPARED_ROWS], second[:MAX_COMPARED_ROWS]
    floats = np.issubdtype(first.dtype, np.floating) or left.dtype.name == "bfloat16"
    if floats and first.ndim == 2 and first.shape[1] > 1:
        same = first.argmax(axis=1) == second.argmax(axis=1)
        same &= np.isfinite(first).all(axis=1) == np.isfinite(second).all(axis=1)
        return len(first), int(same.sum())
    if not first.size:
        return len(first), len(first)
    flat = (first.reshape(len(first), -1), second.reshape(len(second), -1))
    same = np.isclose(*flat, rtol=0.01, atol=0.001, equal_nan=True) if floats else flat[0] == flat[1]
    return len(first), int(np.asarray(same).all(axis=1).sum())
