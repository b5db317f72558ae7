"""Whether an engine reproduces the answers that a version was published with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelport_registry import Golden, SignatureSpec
from modelport_server.engines.protocol import Array, Engine, EngineError

_WARM_UP_S = 5.0


class GoldenMismatchError(Exception):
    """The outputs differ from the published ones; the text says where and by how much."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What the golden check found."""

    examples: int
    """How many examples were reproduced."""
    dependent: tuple[str, ...]
    """Batched signatures whose rows turned out to depend on each other: they run as they are called."""


def check_golden(engine: Engine, golden: Sequence[Golden], batched: Sequence[str], largest: int) -> Verified:
    """Runs the golden examples and compares.

    Each set is run as it was published, in one call. A batched signature is also run at 1 row, at
    ``largest`` rows and at a size between. If it is right as published and not so in parts, its rows
    depend on each other.

    Raises:
        GoldenMismatchError: if an output is off by more than the tolerance that was published with it.
        EngineError: if the model fails on an example.
    """
    dependent: list[str] = []
    total = 0
    for example in golden:
        rows = _rows(example.inputs) if example.signature in batched else 1
        _compare(example, engine.run(example.signature, example.inputs))
        if example.signature in batched and not _row_by_row(engine, example, rows, largest):
            dependent.append(example.signature)
        total += rows
    return Verified(total, tuple(dependent))


def _row_by_row(engine: Engine, example: Golden, rows: int, largest: int) -> bool:
    sizes = {1, max(1, min(largest, rows * 2) // 2), largest}
    try:
        for size in sorted(sizes):
            _compare(example, _run_in_batches(engine, example, rows, size))
    except (GoldenMismatchError, EngineError):
        return False
    return True


def _run_in_batches(engine: Engine, example: Golden, rows: int, size: int) -> dict[str, Array]:
    """Runs the examples ``size`` rows at a time, repeating them where there are fewer than that."""
    repeated = -(-max(size, rows) // rows)
    inputs = {name: np.concatenate([array] * repeated) for name, array in example.inputs.items()}
    stop = max(rows, size)
    results = [
        engine.run(example.signature, {name: array[first : first + size] for name, array in inputs.items()})
        for first in range(0, stop, size)
    ]
    try:
        joined = {name: np.concatenate([result[name] for result in results]) for name in example.outputs}
    except ValueError:  # as when a row is padded to the longest of its batch
        raise GoldenMismatchError(f"{example.signature}: the shape of a row depends on the other rows") from None
    return {name: array[:rows] for name, array in joined.items()}


def _compare(example: Golden, outputs: Mapping[str, Array]) -> None:
    for name, expected in example.outputs.items():
        if name not in outputs:
            raise GoldenMismatchError(f"{example.signature}: the output {name!r} is missing")
        difference = _difference(np.asarray(expected), np.asarray(outputs[name]), example)
        if difference:
            raise GoldenMismatchError(f"{example.signature}: output {name!r} {difference}")


def _difference(expected: Array, actual: Array, example: Golden) -> str:
    """Returns what is different between two outputs, or nothing."""
    if expected.shape != actual.shape:
        return f"has shape {list(actual.shape)}, published was {list(expected.shape)}"
    if expected.dtype.kind not in "fV" and expected.dtype.name != "bfloat16":
        wrong = int(np.count_nonzero(expected != actual))
        return f"differs from what was published in {wrong} of {expected.size} values" if wrong else ""
    left, right = expected.astype(np.float64), actual.astype(np.float64)
    bad = ~np.isclose(right, left, rtol=example.rtol, atol=example.atol, equal_nan=True)
    if not bad.any():
        return ""
    off = np.abs(right - left)[bad]
    worst = "NaN or infinity" if not np.isfinite(off).all() else f"by up to {off.max():.3g}"
    return (
        f"differs from what was published in {int(bad.sum())} of {bad.size} values, {worst} "
        f"(tolerance {example.rtol:g} relative, {example.atol:g} absolute)"
    )


def warm_up(
    engine: Engine,
    signatures: Sequence[SignatureSpec],
    golden: Sequence[Golden],
    batched: Sequence[str],
    largest: int,
) -> None:
    """Runs every signature at every power of two of rows, so that no caller pays for a first time.

    Inputs are the golden ones where there are some, else zeros. A model that does not take zeros is
    not at fault: what fails here is passed over.
    """
    examples = {example.signature: example.inputs for example in golden}
    deadline = time.monotonic() + _WARM_UP_S
    for spec in signatures:
        inputs = examples.get(spec.name) or _zeros(spec)
        if inputs is None:
            continue
        for size in _sizes(largest) if spec.name in batched else (0,):
            if time.monotonic() > deadline:
                return
            try:
                engine.run(spec.name, _resized(inputs, size))
            except EngineError:
                break


def _sizes(largest: int) -> list[int]:
    return [1 << power for power in range(largest.bit_length()) if 1 << power < largest] + [largest]


def _resized(inputs: Mapping[str, Array], rows: int) -> Mapping[str, Array]:
    if not rows:
        return inputs
    return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in inputs.items()}


def _zeros(spec: SignatureSpec) -> dict[str, Array] | None:
    arrays: dict[str, Array] = {}
    for tensor in spec.inputs:
        if tensor.shape is None:
            return None
        shape = [1 if size is None else size for size in tensor.shape]
        dtype = numpy_dtype(tensor.dtype)
        if dtype is None:
            return None
        arrays[tensor.name] = np.full(shape, b"", object) if dtype.hasobject else np.zeros(shape, dtype)
    return arrays


def numpy_dtype(name: str) -> np.dtype[Any] | None:
    """Returns numpy's type for one of ``modelport.tensors.DTYPES``; None if it has none."""
    if name == "string":
        return np.dtype(object)
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    try:
        return np.dtype(name)
    except TypeError:
        return None


def _rows(inputs: Mapping[str, Array]) -> int:
    return len(next(iter(inputs.values())))
