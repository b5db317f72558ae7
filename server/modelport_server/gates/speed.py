"""Gate 7: whether a version is slower than the stable one, measured side by side on this machine."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from modelport.exceptions import ModelportError
from modelport.names import DEFAULT_SIGNATURE, shown
from modelport_registry import JSON, Golden, SignatureSpec
from modelport_server.errors import NotAvailableError, OverloadedError, ServeError
from modelport_server.gates.result import SPEED, GateResult, Outcome

Inputs = Mapping[str, NDArray[Any]]

MIDDLE_ROWS = 32
"""The larger of the two batches that are measured, if versions take that many rows."""

_FEWEST_PAIRS = 9
_SHARE_BESIDE_CALLERS = 0.005
"""The share of the stable version's time that measuring may take while there are callers, if the time suffices."""
_PAUSES_SHARE = 0.5
"""The share of the gate's time in which the pauses for that must fit, however often is measured."""
_MOST_SIGNATURES = 3
_MOST_LOOKS = 4
"""What seems too slow is measured anew, up to so many times in all."""
_DOUBTFUL = 0.6
"""At this share of what is too slow, and above, a few measurements do not tell."""
_EXACT_PAIRS = 20
"""A look with so many is believed if it finds that a version is not slow."""
_PAUSE_S = 0.5
"""Between two looks, so that what disturbed the one may be over at the next."""
_LONGEST_BATCH_US = 20_000.0
"""Calls of the stable version wait behind what is measured on it: larger batches are cut to about that long."""
_SHORT_BATCH_US = 5_000.0
"""Shorter ones are run twice, and the second counts: the first finds its caches cold, unless callers keep them warm."""
_NOT_FELT_US = 150.0
"""A batch that takes so much longer is not slower to anybody: a call over the network takes longer than that by itself.

And it would tell nothing of a tiny model: one of 30 us seems up to 94 us longer than its equal while others keep all
cores busy, in looks of a second each.
"""


@dataclass(frozen=True, slots=True)
class Probe:
    """What one batch took."""

    engine_time_us: float
    """From its start to its end in the engine."""
    cpu_time_us: float
    """Processor time of all the engine's threads meanwhile."""


class Prober(Protocol):
    """Runs a batch on a version and says what it took."""

    async def probe(self, signature: str, inputs: Inputs) -> Probe:
        """Runs one batch by itself.

        Raises:
            ServeError: if it can't be run.
        """
        ...


def probe_sizes(largest: int) -> tuple[int, ...]:
    """Returns the batch sizes to measure at, where the largest batch has ``largest`` rows."""
    return (1,) if largest == 1 else (1, min(largest, MIDDLE_ROWS))


def shared_examples(
    golden: Sequence[Golden], stable: Mapping[str, SignatureSpec], candidate: Mapping[str, SignatureSpec]
) -> dict[str, Inputs]:
    """Returns a version's golden inputs by signature, for those signatures that take the same in both versions."""
    same = {name for name in stable.keys() & candidate.keys() if _taken(stable[name]) == _taken(candidate[name])}
    return {example.signature: example.inputs for example in golden if example.signature in same}


def _taken(spec: SignatureSpec) -> list[tuple[str, str]]:
    return [(tensor.name, tensor.dtype) for tensor in spec.inputs]


async def compare_speed(
    stable: Prober | None,
    candidate: Prober,
    examples: Mapping[str, Inputs],
    *,
    batched: Collection[str],
    sizes: Sequence[int],
    max_ratio: float,
    budget_s: float = 1.0,
    limit_s: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    has_callers: Callable[[], bool] = lambda: False,
    model: str = "MODEL",
) -> GateResult:
    """Runs equal batches on both versions in turns and compares what a row takes.

    A call of the stable version waits behind what is measured on it. So while there are calls, few batches are
    measured, with pauses between, so that hardly a call in a hundred is held up.

    Others use the machine too: their calls make wall time longer, and an engine that waits busily makes
    processor time longer. A version is slower if both medians are, at one size of batch. What seems so is measured
    up to four times with pauses between: all of it together has to say so, and every look that is exact enough.

    Args:
        stable: the version in charge; None without one.
        candidate: the version that would replace it.
        examples: inputs by signature, as ``shared_examples`` returns them.
        batched: the signatures whose rows may run together in both versions.
        sizes: the rows per batch to measure at.
        max_ratio: how many times longer a row of the candidate may take.
        budget_s: how long to measure, in seconds; each size is measured nine times in any case, and no more often
            than that where there are callers.
        limit_s: how long it may take, in seconds. A candidate that takes too long for it fails; where both do,
            what was measured by then counts.
        clock: returns seconds.
        pause: returns after so many seconds.
        has_callers: returns whether the stable version has calls to answer.
        model: the model's name, for the text that says how to allow more.

    Returns:
        What was found; skipped where there is nothing to compare with.

    Raises:
        NotMeasurableError: if it can't be told now, and not because of the candidate.
    """
    started = clock()

    def result(outcome: Outcome, reason: str = "", figures: Mapping[str, JSON] | None = None) -> GateResult:
        return GateResult(SPEED, outcome, clock() - started, figures or {}, reason)

    if stable is None:
        return result(Outcome.SKIPPED, "there is no other version in charge to compare with")
    cases = list(_cases(examples, batched, sizes))
    if not cases:
        return result(Outcome.SKIPPED, "there are no golden inputs that the stable version takes too")
    most_pairs = len(cases) * _MOST_LOOKS * _FEWEST_PAIRS
    race = _Race(stable, candidate, clock, pause, has_callers, limit_s * _PAUSES_SHARE / most_pairs)
    too_long = f"took more than {limit_s:g} s"
    try:
        async with asyncio.timeout(limit_s if math.isfinite(limit_s) else None):
            for case in cases:
                if not await race.fit(case, cases):
                    continue
                await race.run(case, budget_s / len(cases))
                while case.doubtful(max_ratio) and len(case.looks) < _MOST_LOOKS:  # it may be somebody else's doing
                    await pause(_PAUSE_S)
                    await race.run(case, budget_s / len(cases))
                if case.slower(max_ratio):
                    break  # that is enough to reject it
    except TimeoutError:
        if race.candidate_waits.mean_s > max_ratio * race.stable_waits.mean_s:
            return result(Outcome.FAILED, too_long)
        if not any(case.looks for case in cases):
            raise NotMeasurableError(f"the version in charge {too_long} to be measured") from None
    except _StableFailedError as error:
        return result(Outcome.SKIPPED, f"the stable version can't be measured: {error}")
    except OverloadedError as error:
        raise NotMeasurableError(str(error)) from error
    except ServeError as error:
        return result(Outcome.FAILED, f"it fails on its golden inputs: {error}")
    cases = [case for case in cases if case.looks]
    figures: dict[str, JSON] = {"max_ratio": max_ratio, "measured": [case.figures() for case in cases]}
    slow = [case for case in cases if case.slower(max_ratio)]
    if not slow:
        return result(Outcome.PASSED, figures=figures)
    worst = max(slow, key=lambda case: case.ratio)
    return result(Outcome.FAILED, worst.text(max_ratio, model), figures)


@dataclass(frozen=True, slots=True)
class _Look:
    """Batches that both versions ran in turns."""

    stable: list[Probe] = field(default_factory=list[Probe])
    candidate: list[Probe] = field(default_factory=list[Probe])

    @property
    def ratio(self) -> float:
        return _ratio(_wall(self.stable), _wall(self.candidate))

    @property
    def cpu_ratio(self) -> float:
        return _ratio(_cpu(self.stable), _cpu(self.candidate))

    @property
    def longer_us(self) -> float:
        return _wall(self.candidate) - _wall(self.stable)

    def slower(self, max_ratio: float) -> bool:
        return self.longer_us > _NOT_FELT_US and self.ratio > max_ratio and self.cpu_ratio > max_ratio

    def figures(self, rows: int) -> dict[str, JSON]:
        return {
            "rows": rows,
            "pairs": len(self.candidate),
            "stable_us_per_row": round(_wall(self.stable) / rows, 2),
            "candidate_us_per_row": round(_wall(self.candidate) / rows, 2),
            "ratio": round(self.ratio, 3),
            "stable_cpu_us_per_row": round(_cpu(self.stable) / rows, 2),
            "candidate_cpu_us_per_row": round(_cpu(self.candidate) / rows, 2),
            "cpu_ratio": round(self.cpu_ratio, 3),
        }


@dataclass(slots=True)
class _Case:
    """One signature at one size of batch."""

    signature: str
    inputs: Inputs
    batch_rows: int = 0
    """How many rows run together; 0 for a signature whose rows do not."""
    looks: list[_Look] = field(default_factory=list[_Look])

    @property
    def rows(self) -> int:
        """How many rows a call has; all that is given to a signature whose rows do not run together is one."""
        return self.batch_rows or 1

    @property
    def all(self) -> _Look:
        """What was measured at all looks together."""
        return _Look(
            [p for look in self.looks for p in look.stable], [p for look in self.looks for p in look.candidate]
        )

    def cut(self, whole_us: float) -> bool:
        """Cuts the batch so that callers need not wait long for it; returns whether two rows are left.

        Args:
            whole_us: what all its rows take.
        """
        most = int(self.batch_rows * _LONGEST_BATCH_US / max(whole_us, 1.0))
        if most < self.batch_rows:
            self.batch_rows = most
            self.inputs = _resized(self.inputs, most)
        return most > 1

    def doubtful(self, max_ratio: float) -> bool:
        """Returns whether it may be too slow, and no look shows that it is not."""
        seen = self.all
        near = seen.longer_us > _DOUBTFUL * _NOT_FELT_US and min(seen.ratio, seen.cpu_ratio) > _DOUBTFUL * max_ratio
        exact = (look for look in self.looks if len(look.candidate) >= _EXACT_PAIRS)
        return near and all(look.slower(max_ratio) for look in exact)

    def slower(self, max_ratio: float) -> bool:
        """Returns whether everything that was measured says so."""
        return self.doubtful(max_ratio) and self.all.slower(max_ratio)

    @property
    def ratio(self) -> float:
        return self.all.ratio

    def figures(self) -> dict[str, JSON]:
        return {"signature": self.signature, "looks": len(self.looks), **self.all.figures(self.rows)}

    def text(self, max_ratio: float, model: str) -> str:
        seen = self.all
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return (
            f"signature {shown(self.signature)} takes {_wall(seen.candidate) / self.rows:.0f} us per row with "
            f"{rows} together, the stable version {_wall(seen.stable) / self.rows:.0f} us: {seen.ratio:.1f} times as "
            f"long, {seen.cpu_ratio:.1f} times the processor time (at most {max_ratio:g}); "
            f"if that is fine: modelport policy {model} --max-speed-ratio RATIO"
        )


def _wall(probes: list[Probe]) -> float:
    return median(probe.engine_time_us for probe in probes)


def _cpu(probes: list[Probe]) -> float:
    return median(probe.cpu_time_us for probe in probes)


def _ratio(stable: float, candidate: float) -> float:
    return max(candidate, 1.0) / max(stable, 1.0)


class NotMeasurableError(ModelportError):
    """Versions can't be compared now, and nothing says that it is the candidate's fault."""


class _StableFailedError(Exception):
    """The stable version does not answer these inputs: that says nothing about the candidate."""


@dataclass(slots=True)
class _Waits:
    """How long a version was waited for."""

    seconds: float = 0.0
    runs: int = 0

    @property
    def mean_s(self) -> float:
        return self.seconds / self.runs if self.runs else 0.0


@dataclass(slots=True)
class _Race:
    """Two versions that run the same batches in turns."""

    stable: Prober
    candidate: Prober
    clock: Callable[[], float]
    pause: Callable[[float], Awaitable[None]]
    has_callers: Callable[[], bool]
    longest_pause_s: float
    stable_waits: _Waits = field(default_factory=_Waits)
    candidate_waits: _Waits = field(default_factory=_Waits)
    held_up_s: float = 0.0
    """How long callers have waited for what was measured since the last pause for them."""

    async def fit(self, case: _Case, cases: Sequence[_Case]) -> bool:
        """Returns whether a case can be measured without callers' having to wait long, cut if need be."""
        if case.batch_rows <= 1:
            return True
        if any(_wall(o.all.candidate) > _LONGEST_BATCH_US for o in cases if o.looks and o.signature == case.signature):
            return False  # one row takes as long as a batch may
        # On the candidate, for which nobody waits yet; twice if need be, since the first run may be longer.
        probe = await self.candidate.probe(case.signature, case.inputs)
        if probe.engine_time_us > _LONGEST_BATCH_US:
            probe = await self.candidate.probe(case.signature, case.inputs)
        return case.cut(probe.engine_time_us)

    async def run(self, case: _Case, budget_s: float) -> None:
        await self._leave_to_callers()
        await self._run_stable(case)  # not measured: the first run of a shape may be longer
        await self._run_candidate(case)
        look, end = _Look(), self.clock() + budget_s
        while self._goes_on(len(look.candidate), end):
            await self._leave_to_callers()
            first, second = self._run_stable, self._run_candidate
            if len(look.candidate) % 2:  # so that neither is always the one after a pause
                first, second = second, first
            probes = {one: await self._warm(one, case) for one in (first, second)}
            look.stable.append(probes[self._run_stable])
            look.candidate.append(probes[self._run_candidate])
            if len(look.candidate) == 1:
                case.looks.append(look)

    def _goes_on(self, pairs: int, end_s: float) -> bool:
        return pairs < _FEWEST_PAIRS or (self.clock() < end_s and not self.has_callers())

    async def _leave_to_callers(self) -> None:
        """Pauses for long enough that what was measured last was a small share of the stable version's time."""
        held_up_s, self.held_up_s = self.held_up_s, 0.0
        if self.has_callers():
            await self.pause(min(held_up_s / _SHARE_BESIDE_CALLERS, self.longest_pause_s))

    async def _warm(self, run: Callable[[_Case], Awaitable[Probe]], case: _Case) -> Probe:
        probe = await run(case)
        kept_warm = run == self._run_stable and self.has_callers()
        return await run(case) if probe.engine_time_us < _SHORT_BATCH_US and not kept_warm else probe

    async def _run_stable(self, case: _Case) -> Probe:
        try:
            probe = await self._run(self.stable, self.stable_waits, case)
        except NotAvailableError as error:
            raise NotMeasurableError(f"the version in charge can't be measured: {error}") from error
        except OverloadedError:
            raise
        except ServeError as error:
            raise _StableFailedError(str(error)) from error
        self.held_up_s += probe.engine_time_us / 1e6
        return probe

    async def _run_candidate(self, case: _Case) -> Probe:
        return await self._run(self.candidate, self.candidate_waits, case)

    async def _run(self, version: Prober, waits: _Waits, case: _Case) -> Probe:
        began_s = self.clock()
        waits.runs += 1
        try:
            return await version.probe(case.signature, case.inputs)
        finally:
            waits.seconds += self.clock() - began_s


def _cases(examples: Mapping[str, Inputs], batched: Collection[str], sizes: Sequence[int]) -> Iterator[_Case]:
    names = sorted(examples, key=lambda name: (name != DEFAULT_SIGNATURE, name))[:_MOST_SIGNATURES]
    for name in names:
        inputs = examples[name]
        if name not in batched:
            yield _Case(name, inputs)
        elif all(len(array) for array in inputs.values()):
            yield from (_Case(name, _resized(inputs, size), size) for size in sorted(set(sizes)))


def _resized(inputs: Inputs, rows: int) -> dict[str, NDArray[Any]]:
    return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in inputs.items()}
