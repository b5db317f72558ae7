"""The golden check: what counts as the answers that a version was published with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: TID253 - the tests need not do without it
import numpy as np
import pytest
from numpy.typing import NDArray

from modelport_registry import Golden, SignatureSpec, TensorSpec
from modelport_server.engines.protocol import Array, EngineError
from modelport_server.engines.verification import GoldenMismatchError, check_golden, warm_up

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
    return found.examples, found.dependent


def test_equal_answers_pass_and_are_counted() -> None:
    assert _check(lambda x: x * 2, _golden(X * 2)) == (8, ())
    assert _check(lambda x: x * 2, _golden(X * 2), batched=False) == (1, ())


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


def test_it_is_run_at_one_row_at_the_largest_batch_and_between() -> None:
    engine = FakeEngine(lambda x: x)
    check_golden(engine, [_golden(X)], ["serving_default"], 16)
    assert {1, 8, 16} <= set(engine.sizes)
    assert max(engine.sizes) == 16


def _spec(shape: tuple[int | None, ...] | None, dtype: str = "float32") -> SignatureSpec:
    tensor = TensorSpec(name="x", dtype=dtype, shape=shape)
    return SignatureSpec(name="serving_default", inputs=(tensor,), outputs=(TensorSpec("y", dtype, shape),))


def test_warming_up_runs_every_power_of_two() -> None:
    engine = FakeEngine(lambda x: x)
    warm_up(engine, [_spec((None,))], [], ["serving_default"], 24)
    assert engine.sizes == [1, 2, 4, 8, 16, 24]


def test_warming_up_uses_golden_examples_as_they_are_where_there_is_no_batch() -> None:
    engine = FakeEngine(lambda x: x)
    warm_up(engine, [_spec((8,))], [_golden(X)], [], 24)
    assert engine.sizes == [8]


@pytest.mark.parametrize("spec", [_spec(None), _spec((None,), "resource")], ids=["rank", "dtype"])
def test_warming_up_passes_over_what_it_cant_make(spec: SignatureSpec) -> None:
    engine = FakeEngine(lambda x: x)
    warm_up(engine, [spec], [], [], 4)
    assert engine.sizes == []


def test_warming_up_is_not_spoilt_by_a_model_that_takes_no_zeros() -> None:
    def fail(_: Array) -> Array:
        raise EngineError("zeros")

    warm_up(FakeEngine(fail), [_spec((None,))], [], ["serving_default"], 4)
