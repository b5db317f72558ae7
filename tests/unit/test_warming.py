"""Warming up: everything that callers may ask for has been run before, and often enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelport_registry import Golden, SignatureSpec, TensorSpec
from modelport_server.engines.protocol import Array, EngineError
from modelport_server.engines.warming import (
    Request,
    TimedEngine,
    WarmedUp,
    WarmUp,
    WarmUpError,
    efficient_rows,
    knee,
    sizes,
)

X = np.arange(8, dtype=np.float32)
GOLDEN = Golden("serving_default", {"x": X}, {"y": X})


class Machine:
    """A clock, and an engine on which a run takes as long as the test says."""

    name = "fake"

    def __init__(self, seconds: Callable[[int, int], float] = lambda run, rows: 1.0) -> None:
        self.now = 0.0
        self.sizes: list[int] = []
        self.inputs: list[Array] = []
        self._seconds = seconds

    def clock(self) -> float:
        return self.now

    def load(self, path: Path, signatures: Sequence[str]) -> None:
        """Has nothing to load."""

    def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        x = inputs["x"]
        rows = len(x) if x.ndim else 0
        self.now += self._seconds(self.sizes.count(rows), rows)
        self.sizes.append(rows)
        self.inputs.append(x)
        if (x < 0).any():
            raise EngineError("x is negative")
        return {"y": x}


def _spec(shape: tuple[int | None, ...] | None = (None,), dtype: str = "float32") -> SignatureSpec:
    tensor = TensorSpec(name="x", dtype=dtype, shape=shape)
    return SignatureSpec(name="serving_default", inputs=(tensor,), outputs=(TensorSpec("y", dtype, shape),))


def _warm_up(
    machine: Machine,
    *,
    spec: SignatureSpec | None = None,
    golden: Sequence[Golden] = (),
    requests: Sequence[Request] = (),
    batched: bool = True,
    largest: int = 24,
    limit_s: float = 1000.0,
    compiles_sizes: bool = False,
    in_haste: bool = False,
) -> WarmedUp:
    return WarmUp(
        engine=machine,
        signatures={"serving_default": spec or _spec()},
        batched=["serving_default"] if batched else [],
        largest=largest,
        limit_s=limit_s,
        compiles_sizes=compiles_sizes,
        in_haste=in_haste,
        clock=machine.clock,
    ).run(golden, requests)


def test_every_power_of_two_is_run_twice_when_nothing_is_gained() -> None:
    machine = Machine()
    assert _warm_up(machine) == WarmedUp(
        12, 0, {1, 2, 4, 8, 16, 24}, spent_s={"serving_default": dict.fromkeys([1, 2, 4, 8, 16, 24], 1.0)}
    )
    assert machine.sizes == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 24, 24]
    assert sizes(1) == [1]


def test_a_size_is_run_until_it_takes_no_less_time() -> None:
    machine = Machine(lambda run, rows: (8.0, 4.0, 2.0, 2.0, 2.0)[run])
    _warm_up(machine, largest=1)
    assert machine.sizes == [1] * 4


def test_a_size_that_keeps_gaining_is_not_run_for_ever() -> None:
    machine = Machine(lambda run, rows: 2.0**-run)
    _warm_up(machine, largest=1)
    assert len(machine.sizes) == 8


def test_when_time_grows_short_each_size_is_run_once() -> None:
    machine = Machine(lambda run, rows: 10.0)
    _warm_up(machine, limit_s=120.0)
    assert machine.sizes == [1, 1, 2, 2, 4, 4, 8, 16, 24]


def test_an_engine_that_compiles_sizes_runs_every_one() -> None:
    machine = Machine(lambda run, rows: 0.001 * rows)
    done = _warm_up(machine, largest=24, compiles_sizes=True)
    assert done.batch_sizes == {1, 2, 4, 8, 16, 24}
    assert machine.sizes[12:] == sorted(set(range(1, 24)) - {1, 2, 4, 8, 16})


@pytest.mark.parametrize(("in_haste", "run"), [(False, {*range(1, 129)}), (True, {*range(1, 17), 32, 64, 128})])
def test_of_large_sizes_the_powers_of_two_are_enough_while_nobody_is_served(in_haste: bool, run: set[int]) -> None:
    machine = Machine(lambda run, rows: 0.0001 * rows)
    _warm_up(machine, largest=128, compiles_sizes=True, in_haste=in_haste)
    assert set(machine.sizes) == run


def test_sizes_are_compiled_for_so_long_and_no_longer() -> None:
    machine = Machine(lambda run, rows: 0.5)
    _warm_up(machine, largest=24, compiles_sizes=True)
    assert machine.sizes[12:] == [3, 5, 6, 7]


def test_golden_examples_are_used_as_they_are_where_there_is_no_batch() -> None:
    machine = Machine()
    _warm_up(machine, spec=_spec((8,)), golden=[GOLDEN], batched=False)
    assert machine.sizes == [8, 8]


def test_requests_are_run_as_they_are_and_in_batches() -> None:
    machine = Machine()
    request = ("serving_default", {"x": np.full(3, 7, np.float32)})
    assert _warm_up(machine, requests=[request], largest=2) == WarmedUp(
        5, 1, {1, 2}, spent_s={"serving_default": {1: 1.0, 2: 1.0}}
    )
    assert machine.sizes == [3, 1, 1, 2, 2]
    assert all((x == 7).all() for x in machine.inputs)


def test_inputs_with_rows_of_another_shape_are_run_too() -> None:
    machine = Machine()
    wide = ("serving_default", {"x": np.ones((2, 5), np.float32)})
    _warm_up(machine, golden=[GOLDEN], requests=[wide, wide], largest=2)
    assert {x.shape for x in machine.inputs} == {(2, 5), (1,), (2,), (1, 5)}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (("serving_default", {"x": -X}), "fails on warm-up request 2: x is negative"),
        (("other", {"x": X}), "warm-up request 2 is for the signature 'other'"),
        (("serving_default", {"z": X}), r"warm-up request 2 has the inputs \['z'\], not \['x'\]"),
    ],
    ids=["fails", "signature", "inputs"],
)
def test_a_request_that_cant_be_run(request_: Request, words: str) -> None:
    with pytest.raises(WarmUpError, match=words):
        _warm_up(Machine(), requests=[("serving_default", {"x": X}), request_])


@pytest.mark.parametrize("spec", [_spec(None), _spec((None,), "resource")], ids=["rank", "dtype"])
def test_what_cant_be_made_is_passed_over(spec: SignatureSpec) -> None:
    machine = Machine()
    assert _warm_up(machine, spec=spec) == WarmedUp()
    assert machine.sizes == []


def test_a_model_that_takes_no_zeros_is_not_at_fault() -> None:
    class Fussy(Machine):
        def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
            raise EngineError("zeros")

    assert _warm_up(Fussy()) == WarmedUp()


class Narrow(Machine):
    """A model that takes three rows at most in one call."""

    def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if len(inputs["x"]) > 3:
            raise EngineError("more than 3 rows")
        return super().run(signature, inputs)


@pytest.mark.parametrize(
    "given",
    [
        {"golden": [Golden("serving_default", {"x": X[:3]}, {"y": X[:3]})]},
        {"requests": [("serving_default", {"x": X[:3]})]},
    ],
    ids=["golden", "request"],
)
def test_a_model_that_fails_at_a_batch_size_that_will_be_used(given: Any) -> None:
    with pytest.raises(WarmUpError, match="the model fails on a batch of 4 of its published inputs: more than 3"):
        _warm_up(Narrow(), **given)


def test_a_model_that_takes_no_batch_of_zeros_is_not_at_fault() -> None:
    assert _warm_up(Narrow()).batch_sizes == {1, 2}


def test_a_model_that_fails_on_its_golden_examples_again() -> None:
    class Flaky(Machine):
        def run(self, signature: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
            raise EngineError("not again")

    with pytest.raises(WarmUpError, match="fails on its published inputs: not again"):
        _warm_up(Flaky(), golden=[GOLDEN], batched=False)


def test_the_first_and_the_last_single_row_are_timed() -> None:
    machine = Machine(lambda run, rows: 0.5 if run == 0 else 0.01)
    engine = TimedEngine(machine, machine.clock)
    assert engine.figures() == {}
    for rows in (1, 4, 1, 1):
        engine.run("serving_default", {"x": np.ones(rows, np.float32)})
    assert engine.figures() == {"first_row_ms": 500.0, "last_row_ms": 10.0}


def test_a_model_that_is_merely_slow_is_in_time() -> None:
    machine = Machine(lambda run, rows: rows * 3.0)
    done = _warm_up(machine, limit_s=60.0)
    assert machine.now <= 60.0
    assert done.left_cold
    assert done.left_cold | done.batch_sizes == {1, 2, 4, 8, 16, 24}
    assert max(done.batch_sizes) < min(done.left_cold)
    assert done.figures()["left_cold"] == sorted(done.left_cold)


@pytest.mark.parametrize(
    ("spent_ms", "expected"),
    [
        ({1: 4.0, 8: 20.0, 16: 32.0, 32: 58.0, 64: 120.0, 128: 240.0}, 32),  # 550 rows/s from 32 on
        ({1: 0.4, 8: 2.0, 16: 3.2, 32: 5.8, 64: 12.0, 128: 24.0}, 128),  # but each costs 5 ms besides
        ({1: 0.4, 8: 2.0, 16: 3.0, 32: 5.0, 64: 8.0, 128: 12.0}, 128),
        ({1: 0.01, 64: 0.2, 128: 0.4}, 128),  # as fast from 64 on, but over in no time
        ({1: 400.0, 2: 800.0, 4: 1610.0}, 1),
        ({1: 3.0}, 1),
    ],
)
def test_batches_need_no_more_rows_than_make_them_fast(spent_ms: dict[int, float], expected: int) -> None:
    assert knee({size: ms / 1e3 for size, ms in spent_ms.items()}) == expected


@pytest.mark.parametrize(
    ("spent_ms", "expected"),
    [
        ({1: 0.5, 2: 0.7, 4: 1.1, 8: 1.9, 16: 3.5, 32: 6.7}, 3),  # 0.3 ms, and 0.2 for each row
        ({1: 5.1, 8: 5.8, 64: 11.4}, 64),  # 5 ms and 0.1: to run fewer gains nothing
        ({1: 5.1, 8: 5.8, 64: 11.4, 128: 17.8}, 100),
        ({1: 40.0, 2: 80.0, 4: 160.0}, 1),
        ({1: 2.0, 2: 3.0, 4: 9.0}, 1),
        ({1: 2.0, 2: 1.0}, 2),
        ({1: 3.0}, 1),
        ({1: 0.0, 2: 0.0}, 2),
    ],
)
def test_from_how_many_rows_on_batches_are_efficient(spent_ms: dict[int, float], expected: int) -> None:
    assert efficient_rows({size: ms / 1e3 for size, ms in spent_ms.items()}) == expected
