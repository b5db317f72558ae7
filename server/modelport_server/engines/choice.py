"""Which engine runs a version: the fastest that reproduces its golden examples, measured on this machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import geometric_mean, median
from typing import Generic, Protocol, TypeVar

import numpy as np

from modelport.names import DEFAULT_SIGNATURE
from modelport_registry import JSON, Golden, SignatureSpec
from modelport_server.batching.calls import BatchRunner
from modelport_server.engines.kinds import FLOAT32, PRECISIONS_OF, TENSORFLOW
from modelport_server.engines.order import LoadOrder
from modelport_server.engines.parallel import ALONE, Parallelism
from modelport_server.engines.probing import Inputs, probe
from modelport_server.engines.process import Loaded, RejectedError
from modelport_server.errors import ServeError
from modelport_server.gates import result as gates
from modelport_server.signatures import is_batchable

_ROUNDS = 9
_BUDGET_S = 1.0
"""How long measuring goes on, in seconds, once each engine has run the smallest batch."""
_MIDDLE_ROWS = 32
_LONG_ROW_MS = 5.0
"""From here on it is measured whether a batch that has all cores is better than several that share them. In shorter
runs the threads of one batch lose more by waiting for each other than they gain."""
_MUCH_FASTER = 1.1
"""How many times as long the engine of the version in charge may take and yet be taken: what is measured varies by a
few per cent, and two versions are told apart the better by their speed and answers the more is alike."""
_OF_ENGINES = (gates.LOAD, gates.GOLDEN, gates.WARM_UP)
"""The gates that one engine may fail and another one pass."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine and what it computes in."""

    engine: str
    precision: str = FLOAT32
    parallelism: Parallelism | None = None
    """How many batches it runs at once; None for what it has by itself."""

    @property
    def text(self) -> str:
        """It for people."""
        return self.engine if self.precision == FLOAT32 else f"{self.engine} {self.precision}"

    @property
    def is_reference(self) -> bool:
        """Whether it is what the version was made with, so that nothing has to be reproduced."""
        return (self.engine, self.precision) == (TENSORFLOW, FLOAT32)


@dataclass(frozen=True, slots=True)
class Attempt:
    """How an engine did."""

    engine: str
    """With its version, once it is known."""
    reason: str = ""
    """Why it was not taken; empty for the one that was."""
    row_ms: Mapping[int, float] = field(default_factory=dict[int, float])
    """What a row took in the median, in milliseconds, by the size of the batch; empty if it was not measured. Of a
    signature whose rows are not joined it is what a call took, under 1."""
    parallelism: str = ""
    """How many batches it ran at once, for people; empty if it ran none."""

    @property
    def text(self) -> str:
        """It for people, in one line."""
        times = ", ".join(f"{ms:.3g} ms a row in batches of {rows}" for rows, ms in self.row_ms.items())
        found = "; ".join(filter(None, (self.parallelism, times)))
        return f"{self.engine}: {self.reason or 'taken'}" + (f" ({found})" if found else "")

    def to_json(self) -> dict[str, JSON]:
        """Returns it as a JSON document."""
        return {
            "engine": self.engine,
            "reason": self.reason,
            "row_ms": {str(n): ms for n, ms in self.row_ms.items()},
            "parallelism": self.parallelism,
        }


class Loader(BatchRunner, Protocol):
    """A process that has nothing loaded yet; ``EngineProcess`` is one."""

    @property
    def pid(self) -> int:
        """Its process id."""
        ...

    async def load(self, order: LoadOrder) -> Loaded:
        """Loads a version, as ``EngineProcess.load``."""
        ...

    async def stop(self) -> None:
        """Ends it."""
        ...


AnyLoader = TypeVar("AnyLoader", bound=Loader)


@dataclass(frozen=True, slots=True)
class Chosen(Generic[AnyLoader]):
    """The engine that was taken, ready to run batches."""

    process: AnyLoader
    loaded: Loaded
    candidate: Candidate
    attempts: tuple[Attempt, ...]
    """All that were tried, the one that was taken last."""


def candidates(engines: Sequence[str], precision: str) -> tuple[tuple[Candidate, ...], ...]:
    """Returns what is tried: each group only if nothing of the one before will do."""
    wanted = tuple(Candidate(engine, precision) for engine in engines if precision in PRECISIONS_OF[engine])
    exact = tuple(Candidate(engine) for engine in engines)
    return (wanted,) if wanted == exact else (wanted, exact)


@dataclass(slots=True, kw_only=True)
class EngineChoice(Generic[AnyLoader]):
    """Loads a version on each engine in a process of its own, and keeps the fastest that passes the gates."""

    order: LoadOrder
    groups: Sequence[Sequence[Candidate]]
    new_process: Callable[[bool], AnyLoader]
    """Makes a process; told whether it is the first one, whose progress is the version's."""
    signatures: Mapping[str, SignatureSpec]
    golden: Sequence[Golden]
    measuring: Callable[[Callable[[], Set[int]]], AbstractContextManager[object]] = lambda pids: nullcontext()
    """Entered with what returns the pids of the engines that are measured, so that callers of others do not notice."""
    usual: Candidate | None = None
    """What runs the version that this one is to take over from: kept unless another one is clearly faster."""
    wide: Parallelism = ALONE
    """What is tried besides where a single row takes long and the order leaves it open."""
    clock: Callable[[], float] = time.monotonic
    _attempts: list[Attempt] = field(default_factory=list[Attempt], init=False)
    _passed: list[_Passed[AnyLoader]] = field(default_factory=list["_Passed[AnyLoader]"], init=False)
    _rejection: RejectedError | None = field(default=None, init=False)

    async def run(self) -> Chosen[AnyLoader]:
        """Returns the engine that was taken; the processes of all others have ended.

        Raises:
            RejectedError: if the version fails a gate on each engine, or one that has nothing to do with engines.
            UnreadableError: if the version could not be read.
            OSError: if a process could not be started.
        """
        try:
            for group in self.groups:
                for candidate in group:
                    await self._try(candidate)
                await self._drop_dependent()
                await self._try_wide()
                if len(self._passed) > 1:
                    await self._measure()
                if self._passed:
                    return await self._take_fastest()
        except BaseException:
            await asyncio.gather(*(passed.process.stop() for passed in self._passed))
            raise
        raise self._rejection or RejectedError(gates.LOAD, self._attempts[-1].reason)

    def _is_unproven(self, candidate: Candidate) -> bool:
        """Whether nobody could tell if it answers as the version was published, and something else may be taken."""
        if candidate.is_reference or {example.signature for example in self.golden} == set(self.signatures):
            return False
        engines = {one.engine for group in self.groups for one in group}
        return len(engines) > 1 or candidate.precision != FLOAT32

    async def _try(self, candidate: Candidate) -> None:
        if self._is_unproven(candidate):
            why = "it can't be told whether it reproduces the model: not every signature has golden examples"
            self._attempts.append(Attempt(candidate.text, why))
            return
        process = self.new_process(self._rejection is None and not self._passed)
        try:
            parallelism = candidate.parallelism or self.order.parallelism
            order = replace(self.order, engine=candidate.engine, precision=candidate.precision, parallelism=parallelism)
            loaded = await process.load(order)
        except RejectedError as error:
            await process.stop()
            if error.gate not in _OF_ENGINES:
                raise
            self._rejection = error
            self._attempts.append(Attempt(candidate.text, f"{error.gate}: {error}"))
        except BaseException:
            await process.stop()
            raise
        else:
            self._passed.append(_Passed(candidate, process, loaded))

    async def _try_wide(self) -> None:
        """Tries what has passed once more with all cores for each batch, if that may matter to a lone caller."""
        if self.order.parallelism is not None or not self.golden:
            return
        for passed in list(self._passed):
            if passed.single_row_ms >= _LONG_ROW_MS and passed.loaded.parallelism != self.wide:
                await self._try(replace(passed.candidate, parallelism=self.wide))

    async def _drop_dependent(self) -> None:
        """Leaves those alone on which the most signatures can be batched."""
        fewest = min((len(passed.loaded.dependent) for passed in self._passed), default=0)
        for passed in list(self._passed):
            if len(passed.loaded.dependent) > fewest:
                await self._drop(passed, "it reproduces the golden examples only in the batches that were published")

    async def _drop(self, passed: _Passed[AnyLoader], why: str) -> None:
        self._passed.remove(passed)
        self._attempts.append(passed.attempt(why))
        await passed.process.stop()

    async def _take_fastest(self) -> Chosen[AnyLoader]:
        fastest = min(self._passed, key=lambda passed: passed.score)
        of_usual = (passed for passed in self._passed if passed.runs_on(self.usual))
        usual = min(of_usual, key=lambda passed: passed.score, default=fastest)
        best = usual if usual.score <= _MUCH_FASTER * fastest.score else fastest
        for passed in [passed for passed in self._passed if passed is not best]:
            same = passed.loaded.engine == best.loaded.engine
            why = f"slower than {best.loaded.parallelism.text if same else best.loaded.engine}"
            if passed.score < best.score:
                why = f"hardly faster than {best.loaded.engine}, which runs the version in charge"
            await self._drop(passed, why)
        self._attempts.append(best.attempt(""))
        return Chosen(best.process, best.loaded, best.candidate, tuple(self._attempts))

    async def _measure(self) -> None:
        """Runs equal batches on all engines in turns; drops those that fail."""
        example = min(self.golden, key=lambda one: one.signature != DEFAULT_SIGNATURE)
        spec = self.signatures[example.signature]
        ends_at = self.clock() + _BUDGET_S
        with self.measuring(self._aside):
            for _ in range(_ROUNDS):
                for inputs, rows in self._batches(example, spec):
                    for passed in list(self._passed):
                        try:
                            await passed.measure(spec, inputs, rows)
                        except ServeError as error:
                            why = f"it fails on golden inputs: {error}"
                            self._rejection = RejectedError(gates.WARM_UP, why)
                            await self._drop(passed, why)
                    if self.clock() > ends_at:
                        return

    def _aside(self) -> Set[int]:
        """Returns the engines that keep off the cores of those who answer: none where nobody is served."""
        return set[int]() if self.order.in_haste else {passed.process.pid for passed in self._passed}

    def _batches(self, example: Golden, spec: SignatureSpec) -> list[tuple[Inputs, int]]:
        """Returns what is run, with its number of rows; what is not joined is run as it was published."""
        if not is_batchable(spec) or any(spec.name in passed.loaded.dependent for passed in self._passed):
            return [(example.inputs, 1)]
        largest = self.order.largest
        sizes = sorted({1, min(largest, _MIDDLE_ROWS), largest})
        return [(_resized(example.inputs, rows), rows) for rows in sizes]


@dataclass(eq=False, slots=True)
class _Passed(Generic[AnyLoader]):
    """An engine that has passed all gates, and what it takes."""

    candidate: Candidate
    process: AnyLoader
    loaded: Loaded
    _times_us: dict[int, list[float]] = field(default_factory=dict[int, list[float]])

    def runs_on(self, other: Candidate | None) -> bool:
        mine = self.candidate
        return other is not None and (mine.engine, mine.precision) == (other.engine, other.precision)

    async def measure(self, spec: SignatureSpec, inputs: Inputs, rows: int) -> None:
        spent = await probe(self.process, spec, inputs)
        self._times_us.setdefault(rows, []).append(spent.engine_time_us)

    @property
    def single_row_ms(self) -> float:
        """What a row by itself took at the end of warming up, in milliseconds; 0 if none ran."""
        found = [gate.figures.get("last_row_ms") for gate in self.loaded.gates]
        return max((ms for ms in found if isinstance(ms, float)), default=0.0)

    def attempt(self, reason: str) -> Attempt:
        return Attempt(self.loaded.engine, reason, self.row_ms, self.loaded.parallelism.text)

    @property
    def row_ms(self) -> dict[int, float]:
        return {rows: median(times) / rows / 1e3 for rows, times in self._times_us.items()}

    @property
    def score(self) -> float:
        """The lower the better: what a row takes by itself, and in batches of which several run at once."""
        instances = self.loaded.parallelism.instances
        return geometric_mean([ms / (instances if rows > 1 else 1) for rows, ms in self.row_ms.items()] or [1.0])


def _resized(inputs: Inputs, rows: int) -> Inputs:
    return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in inputs.items()}
