"""What an output is like, row by row, in a few categories: predicted classes where it has them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modelport.tensors import array_from_bytes
from modelport_server.tensors import RawTensor

Numbers = NDArray[np.float32] | NDArray[np.float64]

NON_FINITE = -(1 << 40)
"""The category of rows with NaN or infinity."""
MAX_ROWS = 256
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
