"""The golden check: what counts as the answers that a version was published with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: TID253 - the tests need not do without it
import numpy as np
import pytest
from numpy.typing import NDArray

from modelport_registry import Golden
from modelport_server.engines.protocol import Array, EngineError
from modelport_server.engines.verification import GoldenMismatchError, Verified, check_golden

X = np.arange(8, dtype=np.float32)


class FakeEngine:
    """An engine that runs a function of ``x``, and notes how many rows it was given."""

    name = "fake"

    def __init__(self, function: Callable[[Array], Array]) -> None:
        self._function = function
        self.sizes: list[int] = []

    def load(self, path: Path, signatures: Sequence[str]) -> None:
        """Has nothing to load."""

    def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Runs the function."""
        x = inputs["x"]
        self.sizes.append(len(x) if x.ndim else 0)
        return {"y": self._function(x)}


def _golden(y: NDArray[Any], x: NDArray[Any] = X, **tolerance: float) -> Golden:
    return Golden("serving_default", {"x": x}, {"y": y}, **tolerance)


def _check(function: Callable[[Array], Array], golden: Golden, *, batched: bool = True) -> tuple[int, tuple[str, ...]]:
    found = check_golden(FakeEngine(function), [golden], ["serving_default"] if batched else [], 16)
    return found.examples, tuple(found.dependent)


def test_equal_answers_pass_and_are_counted() -> None:
    assert _check(lambda x: x * 2, _golden(X * 2)) == (8, ())
    assert _check(lambda x: x * 2, _golden(X * 2), batched=False) == (1, ())


def _always(y: Array) -> Callable[[Array], Array]:
    """Returns a model that answers the same to everything."""
    return lambda x: y


def _nan_at_3(x: Array) -> Array:
    return np.where(x == 3, np.nan, x * 2)


def _infinite_at_3(x: Array) -> Array:
    return np.where(x == 3, np.inf, x * 2)


WRONG: list[tuple[Callable[[Array], Array], str]] = [
    (lambda x: x * 2.001, "'y' differs"),
    (_nan_at_3, "1 of 8 values, NaN"),
    (_infinite_at_3, "NaN or infinity"),
    (lambda x: (x * 2)[:-1], r"shape \[7\], published was \[8\]"),
    (lambda x: (x * 2).reshape(2, 4), r"shape \[2, 4\]"),
]


@pytest.mark.parametrize(("function", "words"), WRONG, ids=["off", "NaN", "infinity", "short", "shape"])
def test_other_answers_do_not(function: Callable[[Array], Array], words: str) -> None:
    with pytest.raises(GoldenMismatchError, match=words):
        _check(function, _golden(X * 2))


def test_a_difference_within_the_tolerance_passes() -> None:
    _check(lambda x: x * np.float32(1.00005), _golden(X))
    with pytest.raises(GoldenMismatchError):
        _check(lambda x: x * np.float32(1.00005), _golden(X, rtol=1e-6, atol=0.0))


def test_nan_where_nan_was_published_passes() -> None:
    y = np.where(X == 3, np.nan, X).astype(np.float32)
    assert _check(lambda x: np.where(x == 3, np.nan, x), _golden(y)) == (8, ())


def test_nan_was_published_and_a_number_came() -> None:
    with pytest.raises(GoldenMismatchError):
        _check(lambda x: x, _golden(np.full(8, np.nan, np.float32)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tolerance", [{}, {"rtol": 1e308, "atol": 1e308}], ids=["usual", "huge"])
def test_no_tolerance_takes_in_what_is_not_finite(dtype: Any, odd: float, tolerance: dict[str, float]) -> None:
    plain: NDArray[Any] = X.astype(dtype)
    strange = plain.copy()
    strange[3] = odd
    for published, given in ((plain, strange), (strange, plain), (strange, -strange if np.isinf(odd) else plain)):
        with pytest.raises(GoldenMismatchError, match=r"NaN or infinity \(tolerance"):
            _check(_always(given), _golden(published, plain, **tolerance), batched=False)
    _check(lambda x: strange, _golden(strange, plain, **tolerance), batched=False)


def test_complex_numbers_are_compared_in_both_parts() -> None:
    z = (X + 1j * X[::-1]).astype(np.complex64)
    _check(lambda x: x * np.complex64(1.00005), _golden(z, z))
    for other in (z + np.float32(0.1), z + np.complex64(0.1j)):
        with pytest.raises(GoldenMismatchError, match=r"8 of 8 values, by up to 0\.1"):
            _check(_always(other), _golden(z, z), batched=False)


def test_an_imaginary_part_that_is_not_finite_is_seen() -> None:
    z = X.astype(np.complex64)
    other = z.copy()
    other[2] = complex(2, np.nan)
    with pytest.raises(GoldenMismatchError, match="1 of 8 values, NaN"):
        _check(lambda x: other, _golden(z, z, rtol=1e300, atol=1e300), batched=False)


def test_the_largest_difference_of_each_output_is_told_also_where_it_is_too_large() -> None:
    verified = Verified()
    check_golden(FakeEngine(lambda x: x + np.float32(2**-18)), [_golden(X)], ["serving_default"], 16, verified)
    assert verified.figures() == {
        "examples": 8,
        "batch_sizes": [1, 8, 16],
        "largest_difference": {"serving_default/y": 3.81e-06},
        "dependent_rows": [],
    }
    with pytest.raises(GoldenMismatchError):
        check_golden(FakeEngine(lambda x: x + 3), [_golden(X)], ["serving_default"], 16, verified)
    assert verified.differences == {"serving_default/y": 3.0}


def test_integers_and_strings_must_be_equal() -> None:
    _check(lambda x: x.astype(np.int64), _golden(X.astype(np.int64)))
    with pytest.raises(GoldenMismatchError, match="1 of 8"):
        _check(lambda x: np.where(x == 3, 4, x).astype(np.int64), _golden(X.astype(np.int64)))
    text = np.array([b"a", b"b"], dtype=object)
    _check(lambda x: x, _golden(text, text))
    with pytest.raises(GoldenMismatchError):
        _check(lambda x: x[::-1], _golden(text, text))


def test_bfloat16_is_compared_as_numbers() -> None:
    x: NDArray[Any] = X.astype(ml_dtypes.bfloat16)
    _check(lambda x: np.add(x, x), _golden(np.add(x, x), x))
    with pytest.raises(GoldenMismatchError):
        _check(lambda x: x, _golden(np.add(x, x), x))


def test_rows_that_depend_on_each_other_are_found_and_no_failure() -> None:
    assert _check(lambda x: x - x.mean(), _golden(X - X.mean())) == (8, ("serving_default",))


def test_a_model_that_fails_on_its_examples() -> None:
    def fail(_: Array) -> Array:
        raise EngineError("no")

    with pytest.raises(EngineError):
        _check(fail, _golden(X))


@pytest.mark.parametrize(
    ("rows", "largest", "sizes"),
    [(8, 16, {1, 8, 16}), (1, 128, {1, 2, 128}), (100, 8, {1, 4, 8, 100}), (3, 2, {1, 2, 3}), (4, 1, {1, 4})],
)
def test_sizes_that_examples_are_run_at(rows: int, largest: int, sizes: set[int]) -> None:
    engine = FakeEngine(lambda x: x)
    x = np.arange(rows, dtype=np.float32)
    verified = check_golden(engine, [_golden(x, x)], ["serving_default"], largest)
    assert verified.batch_sizes == sizes


def test_it_is_run_at_one_row_at_the_largest_batch_and_between() -> None:
    engine = FakeEngine(lambda x: x)
    check_golden(engine, [_golden(X)], ["serving_default"], 16)
    assert {1, 8, 16} <= set(engine.sizes)
    assert max(engine.sizes) == 16
