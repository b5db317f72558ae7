"""Running a version before callers do, so that none of them pays for a first time."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelport_registry import JSON, Golden, SignatureSpec
from modelport_server.engines.protocol import Array, Engine, EngineError, Runs

_MOST_RUNS = 8
_STABLE_GAIN = 0.1
"""A size is warm when a run is not shorter than the shortest before it by more than this share."""
_REPEATS_SHARE = 0.5
"""The share of the time that runs may be repeated in: the rest is for sizes that have not run at all."""
_RUNS_SHARE = 0.9
"""The share of the time in which runs may end. What would take longer stays cold: slow is not broken."""
_SHAPES_S = 2.0
"""How long the sizes between may take to run once, in seconds, for each kind of inputs of an engine that compiles
something for each size."""
_SMALL = 16
"""The largest of those sizes, in rows, while nobody is served: then to answer at all comes before what the first batch
of a large size takes longer (``docs/adr/0052``)."""

_AS_FAST = 0.95
_LONGER_PER_ROW = 1.5
_BESIDES_S = 0.005
"""What a batch of any size costs besides, in seconds of processor time: in the front, in what hands it over, and since
each finds the other's data in the caches. Twice what was measured: batches that are too small cost more than those that
are too large (``docs/adr/0053``)."""

Inputs = Mapping[str, Array]
Request = tuple[str, Inputs]
"""A signature and what it is called with."""


class WarmUpError(Exception):
    """The model fails on inputs that it was published with."""


class TimedEngine:
    """An engine that notes how long single rows take.

    Args:
        engine: what runs the model.
        clock: returns seconds.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self._clock = clock
        self.single_row_s: dict[str, tuple[float, float]] = {}
        """How long the first and the last single row of each signature took."""

    @property
    def name(self) -> str:
        """The engine and its version."""
        return self.engine.name

    def load(self, path: Path, signatures: Sequence[str]) -> None:
        """Loads a SavedModel."""
        self.engine.load(path, signatures)

    def run(self, signature: str, inputs: Inputs) -> Mapping[str, Array]:
        """Runs one batch."""
        started = self._clock()
        outputs = self.engine.run(signature, inputs)
        if all(array.ndim == 0 or len(array) == 1 for array in inputs.values()):
            spent_s = self._clock() - started
            self.single_row_s[signature] = (self.single_row_s.get(signature, (spent_s, 0.0))[0], spent_s)
        return outputs

    def figures(self) -> dict[str, JSON]:
        """Returns how long the first and the last single row took, of the signature that took longest."""
        if not self.single_row_s:
            return {}
        first_s, last_s = max(self.single_row_s.values())
        return {"first_row_ms": round(first_s * 1e3, 3), "last_row_ms": round(last_s * 1e3, 3)}


@dataclass(slots=True)
class WarmedUp:
    """What warming up has done so far."""

    runs: int = 0
    requests: int = 0
    """How many of the version's own warm-up requests were run."""
    batch_sizes: set[int] = field(default_factory=set[int])
    """The sizes of batches, in rows, that were run."""
    left_cold: set[int] = field(default_factory=set[int])
    """The sizes for which the time did not suffice."""
    spent_s: dict[str, dict[int, float]] = field(default_factory=dict[str, dict[int, float]])
    """The shortest time that a batch took, in seconds, by signature and size."""

    @property
    def best_size(self) -> int:
        """The fewest rows with which batches are as fast as with any number, in rows per second; 0 if none ran.

        Of several signatures or kinds of inputs, the most that any of them takes.
        """
        return max(map(knee, self.spent_s.values()), default=0)

    @property
    def efficient_size(self) -> int:
        """With how many rows a batch takes no more than half as long again per row as with any number; 0 if none ran.

        Of several signatures or kinds of inputs, the most that any of them takes.
        """
        return max(map(efficient_rows, self.spent_s.values()), default=0)

    def figures(self) -> dict[str, JSON]:
        """Returns it for people."""
        figures: dict[str, JSON] = {
            "batch_sizes": sorted(self.batch_sizes),
            "runs": self.runs,
            "requests": self.requests,
        }
        return figures | ({"left_cold": sorted(self.left_cold)} if self.left_cold else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """Runs each signature at every power of two of rows up to the largest batch, until runs take no less time.

    Inputs are the golden ones and the version's own requests; a signature that has neither is given zeros,
    and is not at fault if it does not take them.
    """

    engine: Runs
    signatures: Mapping[str, SignatureSpec]
    batched: Sequence[str]
    """The signatures whose rows run together."""
    largest: int
    """The largest batch, in rows."""
    limit_s: float
    """How long it may take, in seconds."""
    compiles_sizes: bool = False
    """Whether the engine's first batch of each size takes longer: then the others run once, too, smallest first."""
    in_haste: bool = False
    """Whether nobody is served yet: then only small ones of the others run."""
    clock: Callable[[], float] = time.monotonic
    done: WarmedUp = field(default_factory=WarmedUp)

    def run(self, golden: Sequence[Golden], requests: Sequence[Request]) -> WarmedUp:
        """Warms the engine up.

        Raises:
            WarmUpError: if the model fails on inputs of ``golden`` or ``requests``, at a size that is not left cold,
                or if a request does not fit the model.
        """
        began = self.clock()
        repeat_until, end_by = began + self.limit_s * _REPEATS_SHARE, began + self.limit_s * _RUNS_SHARE
        for number, (signature, inputs) in enumerate(requests, 1):
            self._request(number, signature, inputs)
        for spec in self.signatures.values():
            given = [example.inputs for example in golden if example.signature == spec.name]
            given += [inputs for signature, inputs in requests if signature == spec.name]
            for inputs in _kinds(given):
                self._every_size(spec.name, inputs, repeat_until, end_by)
            if not given:
                with contextlib.suppress(WarmUpError):  # nobody said that the model takes zeros
                    for inputs in _zeros(spec):
                        self._every_size(spec.name, inputs, repeat_until, end_by)
        return self.done

    def _request(self, number: int, signature: str, inputs: Inputs) -> None:
        spec = self.signatures.get(signature)
        if spec is None:
            raise WarmUpError(f"warm-up request {number} is for the signature {signature!r}, which the model has not")
        wanted = {tensor.name for tensor in spec.inputs}
        if wanted != set(inputs):
            raise WarmUpError(f"warm-up request {number} has the inputs {sorted(inputs)}, not {sorted(wanted)}")
        try:
            self._run(signature, inputs)
        except EngineError as error:
            raise WarmUpError(f"the model fails on warm-up request {number}: {error}") from error
        self.done.requests += 1

    def _every_size(self, signature: str, inputs: Inputs, repeat_until: float, end_by: float) -> None:
        batched = signature in self.batched and all(array.ndim and len(array) for array in inputs.values())
        row_s = 0.0
        for size in sizes(self.largest) if batched else (0,):
            if self.clock() + row_s * size > end_by:
                self.done.left_cold.add(size)
                continue
            spent_s = self._at_size(
                signature, inputs, size, lambda sized: self._until_stable(signature, sized, repeat_until)
            )
            if size:
                row_s = spent_s / size
                self.done.batch_sizes.add(size)
                times = self.done.spent_s.setdefault(signature, {})
                times[size] = max(spent_s, times.get(size, 0.0))
        if batched and self.compiles_sizes:
            self._sizes_between(signature, inputs, row_s, min(end_by, self.clock() + _SHAPES_S))

    def _sizes_between(self, signature: str, inputs: Inputs, row_s: float, end_by: float) -> None:
        run = {*self.done.batch_sizes, *self.done.left_cold}
        for size in range(1, min(self.largest, _SMALL) if self.in_haste else self.largest):
            if self.clock() + row_s * size > end_by:
                return
            if size not in run:
                self._at_size(signature, inputs, size, lambda sized: self._run(signature, sized))

    def _at_size(self, signature: str, inputs: Inputs, size: int, run: Callable[[Inputs], float]) -> float:
        try:
            return run(_resized(inputs, size))
        except EngineError as error:
            what = f"a batch of {size} of its published inputs" if size else "its published inputs"
            raise WarmUpError(f"{signature}: the model fails on {what}: {error}") from error

    def _until_stable(self, signature: str, inputs: Inputs, repeat_until: float) -> float:
        """Returns the shortest time that a run took, in seconds."""
        best_s = self._run(signature, inputs)
        for _ in range(1, _MOST_RUNS):
            if self.clock() > repeat_until:
                break
            spent_s = self._run(signature, inputs)
            stable = spent_s > best_s * (1 - _STABLE_GAIN)
            best_s = min(best_s, spent_s)
            if stable:
                break
        return best_s

    def _run(self, signature: str, inputs: Inputs) -> float:
        started = self.clock()
        self.engine.run(signature, inputs)
        self.done.runs += 1
        return self.clock() - started


def knee(spent_s: Mapping[int, float]) -> int:
    """Returns the fewest rows of a batch that are as many in a second as those of the fastest.

    Args:
        spent_s: how long a batch takes in the engine, in seconds, by its number of rows.
    """
    rates = {size: size / (seconds + _BESIDES_S) for size, seconds in spent_s.items()}
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= _AS_FAST * best)


def efficient_rows(spent_s: Mapping[int, float]) -> int:
    """Returns from how many rows on a batch takes no more than half as long again per row as with any number.

    Times of single sizes are too uncertain for that: a batch is taken to need some time whatever its size, and some
    for each row, which are fitted with the least squares of relative errors. The largest size where the first is so
    long that none of them is enough.

    Args:
        spent_s: how long a batch takes in the engine, in seconds, by its number of rows.
    """
    rows, seconds = np.array(list(spent_s)), np.maximum(list(spent_s.values()), 1e-9)
    (once_s, row_s), *_ = np.linalg.lstsq(np.stack([1 / seconds, rows / seconds], axis=1), np.ones(len(rows)), None)
    if once_s <= 0:
        return 1
    most = int(rows.max())
    return most if row_s <= 0 else min(math.ceil(once_s / row_s / (_LONGER_PER_ROW - 1)), most)


def sizes(largest: int) -> list[int]:
    """Returns the batch sizes that are warmed up: the powers of two below ``largest``, and it."""
    return [1 << power for power in range(largest.bit_length()) if 1 << power < largest] + [largest]


def _kinds(given: Iterable[Inputs]) -> list[Inputs]:
    """Returns one of each kind of inputs: those with rows of equal shapes and types make the same work."""
    kinds: dict[object, Inputs] = {}
    for inputs in given:
        kind = tuple((name, array.dtype.str, array.ndim, array.shape[1:]) for name, array in sorted(inputs.items()))
        kinds.setdefault(kind, inputs)
    return list(kinds.values())


def _resized(inputs: Inputs, rows: int) -> Inputs:
    if not rows:
        return inputs
    return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in inputs.items()}


def _zeros(spec: SignatureSpec) -> list[Inputs]:
    arrays: dict[str, Array] = {}
    for tensor in spec.inputs:
        dtype = numpy_dtype(tensor.dtype)
        if tensor.shape is None or dtype is None:
            return []
        shape = [1 if size is None else size for size in tensor.shape]
        arrays[tensor.name] = np.full(shape, b"", object) if dtype.hasobject else np.zeros(shape, dtype)
    return [arrays]


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
