"""Whether an engine reproduces the answers that a version was published with."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelport_registry import JSON, Golden
from modelport_server.engines.protocol import Array, Engine, EngineError

_MOST_OUTPUTS_SHOWN = 32


class GoldenMismatchError(Exception):
    """The outputs differ from the published ones; the text says where and by how much."""


@dataclass(slots=True)
class Verified:
    """What the golden check has found so far."""

    examples: int = 0
    """How many examples were reproduced."""
    dependent: list[str] = field(default_factory=list[str])
    """Batched signatures whose rows turned out to depend on each other: they run as they are called."""
    batch_sizes: set[int] = field(default_factory=set[int])
    """The sizes, in rows, that examples were run at."""
    differences: dict[str, float] = field(default_factory=dict[str, float])
    """The largest absolute difference of each output, named ``signature/output``, that is a number at both ends."""

    def figures(self) -> dict[str, JSON]:
        """Returns it for people, with the outputs that are off the most."""
        worst = sorted(self.differences.items(), key=lambda item: -item[1])[:_MOST_OUTPUTS_SHOWN]
        return {
            "examples": self.examples,
            "batch_sizes": sorted(self.batch_sizes),
            "largest_difference": {name: float(f"{value:.3g}") for name, value in worst},
            "dependent_rows": list(self.dependent),
        }


def check_golden(
    engine: Engine,
    golden: Sequence[Golden],
    batched: Sequence[str],
    largest: int,
    verified: Verified | None = None,
) -> Verified:
    """Runs the golden examples and compares.

    Each set is run as it was published, in one call. A batched signature is also run at 1 row, at
    ``largest`` rows and at a size between. If it is right as published and not so in parts, its rows
    depend on each other.

    Args:
        engine: what runs the model.
        golden: the examples.
        batched: the signatures whose rows look independent.
        largest: the largest batch, in rows.
        verified: filled as the check goes on, so that it tells how far it came when it fails.

    Raises:
        GoldenMismatchError: if an output is off by more than the tolerance that was published with it.
        EngineError: if the model fails on an example.
    """
    found = Verified() if verified is None else verified
    for example in golden:
        rows = _rows(example.inputs) if example.signature in batched else 1
        found.batch_sizes.add(rows)
        _compare(example, engine.run(example.signature, example.inputs), found.differences)
        if example.signature in batched and not _row_by_row(engine, example, rows, largest, found):
            found.dependent.append(example.signature)
        found.examples += rows
    return found


def _row_by_row(engine: Engine, example: Golden, rows: int, largest: int, found: Verified) -> bool:
    differences = dict(found.differences)
    between = max(2, min(rows, largest // 2)) if largest > 2 else 1
    try:
        for size in sorted({1, between, largest}):
            _compare(example, _run_in_batches(engine, example, rows, size), differences)
    except (GoldenMismatchError, EngineError):
        return False
    found.batch_sizes |= {1, between, largest}
    found.differences |= differences
    return True


def _run_in_batches(engine: Engine, example: Golden, rows: int, size: int) -> dict[str, Array]:
    """Runs the examples ``size`` rows at a time, repeating them where there are fewer than that."""
    repeated = -(-max(size, rows) // rows)
    inputs = {name: np.concatenate([array] * repeated) for name, array in example.inputs.items()}
    stop = max(rows, size)
    results: list[Mapping[str, Array]] = []
    for first in range(0, stop, size):
        outputs = engine.run(example.signature, {name: array[first : first + size] for name, array in inputs.items()})
        results.append({name: np.array(array) for name, array in outputs.items()})  # the next run overwrites them
    try:
        joined = {name: np.concatenate([result[name] for result in results]) for name in example.outputs}
    except ValueError:  # as when a row is padded to the longest of its batch
        raise GoldenMismatchError(f"{example.signature}: the shape of a row depends on the other rows") from None
    return {name: array[:rows] for name, array in joined.items()}


def _compare(example: Golden, outputs: Mapping[str, Array], differences: dict[str, float]) -> None:
    for name, expected in example.outputs.items():
        if name not in outputs:
            raise GoldenMismatchError(f"{example.signature}: the output {name!r} is missing")
        difference, largest = _difference(np.asarray(expected), np.asarray(outputs[name]), example)
        key = f"{example.signature}/{name}"
        differences[key] = max(largest, differences.get(key, 0.0))
        if difference:
            raise GoldenMismatchError(f"{example.signature}: output {name!r} {difference}")


def _difference(expected: Array, actual: Array, example: Golden) -> tuple[str, float]:
    """Returns what is different between two outputs, or nothing, and the largest absolute difference."""
    if expected.shape != actual.shape:
        return f"has shape {list(actual.shape)}, published was {list(expected.shape)}", 0.0
    if not _is_approximate(expected.dtype):
        return _exact_difference(expected, actual)
    left, right = _numbers(expected), _numbers(actual)
    finite = np.isfinite(left) & np.isfinite(right)
    # Apart from the tolerances, which are finite and yet may be so large that they would take in anything.
    odd = ~finite & ~((left == right) | (np.isnan(left) & np.isnan(right)))
    left, right = np.where(finite, left, 0.0), np.where(finite, right, 0.0)
    with np.errstate(over="ignore"):
        off = np.minimum(np.abs(right - left), sys.float_info.max)  # a number, because JSON has no infinity
        bad = odd | (off > example.atol + example.rtol * np.abs(left))
    largest = float(off.max(initial=0.0))
    if not bad.any():
        return "", largest
    worst = "NaN or infinity" if odd.any() else f"by up to {off[bad].max():.3g}"
    values = int(np.count_nonzero(bad.reshape(expected.size, -1).any(axis=1)))
    text = (
        f"differs from what was published in {values} of {expected.size} values, {worst} "
        f"(tolerance {example.rtol:g} relative, {example.atol:g} absolute)"
    )
    return text, largest


def _exact_difference(expected: Array, actual: Array) -> tuple[str, float]:
    different = expected != actual
    wrong = int(np.count_nonzero(different))
    if not wrong:
        return "", 0.0
    numeric = expected.dtype.kind in "iu" and actual.dtype.kind in "iu"
    # As float64 each, because the difference of two integers need not fit into their type.
    largest = float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()) if numeric else 0.0
    return f"differs from what was published in {wrong} of {expected.size} values", largest


def _is_approximate(dtype: np.dtype[Any]) -> bool:
    """Returns whether values of a type are compared with a tolerance: bfloat16 and its like say they are void."""
    return dtype.kind in "fcV" or dtype.name == "bfloat16"


def _numbers(array: Array) -> Array:
    """Returns values as float64, the real and the imaginary parts of complex ones apart."""
    if array.dtype.kind == "c":
        return np.ascontiguousarray(array, np.complex128).view(np.float64).reshape(*array.shape, 2)
    return array.astype(np.float64)


def _rows(inputs: Mapping[str, Array]) -> int:
    return len(next(iter(inputs.values())))
