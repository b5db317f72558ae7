from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from modelport_registry import Golden, SignatureSpec, TensorSpec
from modelport_server.errors import ModelFailureError, NotAvailableError, OverloadedError
from modelport_server.gates.result import GateResult, Outcome
from modelport_server.gates.speed import NotMeasurableError, Probe, Prober, compare_speed, probe_sizes, shared_examples

ROWS = {"x": np.zeros((3, 4), np.float32)}
Noise = Callable[[random.Random], tuple[float, float]]


@dataclass
class Clock:
    """Time that passes as batches run."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    async def pause(self, seconds: float) -> None:
        """Passes without anybody's running."""
        self.now += seconds


@dataclass
class FakeProber:
    """Takes some time per call and per row, times what the noise says for wall and processor time."""

    clock: Clock
    us_per_call: float = 200.0
    us_per_row: float = 20.0
    noise: Noise | None = None
    seed: int = 0
    error: Exception | None = None
    calls: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    async def probe(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Probe:
        if self.error is not None:
            raise self.error
        rows = len(inputs["x"])
        self.calls.append((signature, rows))
        wall, cpu = self.noise(self._random) if self.noise else (1.0, 1.0)
        spent_us = self.us_per_call + rows * self.us_per_row
        self.clock.now += spent_us * wall / 1e6
        return Probe(spent_us * wall, spent_us * cpu)


async def _compare(stable: Prober | None, candidate: FakeProber, **options: Any) -> GateResult:
    settings: dict[str, Any] = {"batched": ["f"], "sizes": (1, 32), "max_ratio": 2.0}
    settings |= {"clock": candidate.clock, "pause": candidate.clock.pause}
    return await compare_speed(stable, candidate, {"f": ROWS}, **(settings | options))


def _measured(result: GateResult) -> Any:
    return result.figures["measured"]


def _waiting(_: random.Random) -> tuple[float, float]:
    return 4.0, 1.0


def _spinning(_: random.Random) -> tuple[float, float]:
    return 1.0, 4.0


async def test_equal_versions_pass_with_all_figures() -> None:
    clock = Clock()
    stable, candidate = FakeProber(clock), FakeProber(clock)
    result = await _compare(stable, candidate)
    assert (result.gate, result.outcome, result.reason) == ("speed", Outcome.PASSED, "")
    assert result.figures["max_ratio"] == 2.0
    assert result.seconds == pytest.approx(1.0, rel=0.05)
    single, batch = _measured(result)
    assert single["pairs"] > 500
    assert {key: single[key] for key in single if key != "pairs"} == {
        "signature": "f",
        "looks": 1,
        "rows": 1,
        "stable_us_per_row": 220.0,
        "candidate_us_per_row": 220.0,
        "ratio": 1.0,
        "stable_cpu_us_per_row": 220.0,
        "candidate_cpu_us_per_row": 220.0,
        "cpu_ratio": 1.0,
    }
    assert (batch["rows"], batch["stable_us_per_row"]) == (32, 26.25)
    assert {rows for _, rows in stable.calls} == {1, 32}
    assert len(candidate.calls) == len(stable.calls) + 1  # to see how long a batch takes


async def test_a_slower_version_fails_with_one_line() -> None:
    clock = Clock()
    result = await _compare(FakeProber(clock), FakeProber(clock, us_per_call=900.0, us_per_row=80.0))
    assert result.outcome is Outcome.FAILED
    assert result.reason == (
        "signature 'f' takes 980 us per row with 1 row together, the stable version 220 us: 4.5 times as long, "
        "4.5 times the processor time (at most 2); if that is fine: modelport policy MODEL --max-speed-ratio RATIO"
    )


async def test_slow_in_batches_alone_is_slow() -> None:
    clock = Clock()
    result = await _compare(FakeProber(clock), FakeProber(clock, us_per_row=90.0))
    assert result.outcome is Outcome.FAILED
    assert "with 32 rows together" in result.reason


@pytest.mark.parametrize("noise", [_waiting, _spinning])
async def test_wall_or_processor_time_alone_proves_nothing(noise: Noise) -> None:
    clock = Clock()
    assert (await _compare(FakeProber(clock), FakeProber(clock, noise=noise))).outcome is Outcome.PASSED


@dataclass
class Disturbed(FakeProber):
    """One that something holds up until a moment, in wall and processor time."""

    until_s: float = 0.0

    async def probe(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Probe:
        factor = 9.0 if self.clock() < self.until_s else 1.0
        self.noise = lambda _: (factor, factor)
        return await super().probe(signature, inputs)


@pytest.mark.parametrize(("until_s", "looks"), [(0.8, 2), (1.8, 3), (2.8, 4)])
async def test_what_passes_is_not_the_versions_doing(until_s: float, looks: int) -> None:
    clock = Clock()
    result = await _compare(FakeProber(clock), Disturbed(clock, until_s=until_s), sizes=(1,), budget_s=0.5)
    assert result.outcome is Outcome.PASSED
    assert _measured(result)[0]["looks"] == looks


async def test_what_nobody_feels_is_not_slow() -> None:
    clock = Clock()
    tiny = FakeProber(clock, us_per_call=5.0, us_per_row=0.1)
    result = await _compare(tiny, FakeProber(clock, us_per_call=30.0, us_per_row=0.1))
    assert result.outcome is Outcome.PASSED
    assert [case["looks"] for case in _measured(result)] == [1, 1], "nobody waits for what can't be slow"
    assert (await _compare(tiny, FakeProber(clock, us_per_call=130.0, us_per_row=0.5))).outcome is Outcome.PASSED
    assert (await _compare(tiny, FakeProber(clock, us_per_call=160.0, us_per_row=0.5))).outcome is Outcome.FAILED


def _busy(source: random.Random) -> tuple[float, float]:
    """A machine that others use: many calls take several times as long, and some of the time is counted as theirs."""
    wall = source.lognormvariate(0.0, 0.4) * (source.uniform(2.0, 12.0) if source.random() < 0.35 else 1.0)
    return wall, source.lognormvariate(0.0, 0.3) * (source.uniform(1.0, 4.0) if source.random() < 0.25 else 1.0)


@pytest.mark.parametrize("callers", [False, True])
@pytest.mark.parametrize("us_per_call", [200.0, 200_000.0])
async def test_equal_versions_are_never_rejected_on_a_busy_machine(us_per_call: float, callers: bool) -> None:
    """The slow model is measured nine times only, as is any model where there are callers."""
    for seed in range(300):
        clock = Clock()
        stable = FakeProber(clock, us_per_call, noise=_busy, seed=seed)
        candidate = FakeProber(clock, us_per_call, noise=_busy, seed=seed + 10_000)
        result = await _compare(stable, candidate, has_callers=lambda: callers)
        assert result.outcome is Outcome.PASSED, (seed, result.to_json())


@pytest.mark.parametrize("callers", [False, True])
@pytest.mark.parametrize("us_per_call", [200.0, 200_000.0])
async def test_four_times_slower_is_nearly_always_found_on_a_busy_machine(us_per_call: float, callers: bool) -> None:
    found = 0
    for seed in range(100):
        clock = Clock()
        stable = FakeProber(clock, us_per_call, noise=_busy, seed=seed)
        candidate = FakeProber(clock, 4 * us_per_call, us_per_row=80.0, noise=_busy, seed=seed + 10_000)
        found += (await _compare(stable, candidate, has_callers=lambda: callers)).outcome is Outcome.FAILED
    assert found >= 95


@dataclass
class Charged(FakeProber):
    """One that counts how long its callers could not be answered."""

    held_up_s: float = 0.0

    async def probe(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Probe:
        began_s = self.clock()
        found = await super().probe(signature, inputs)
        self.held_up_s += self.clock() - began_s
        return found


async def test_callers_are_hardly_held_up() -> None:
    clock = Clock()
    stable = Charged(clock)
    result = await _compare(stable, FakeProber(clock), has_callers=lambda: True, limit_s=60.0)
    assert result.outcome is Outcome.PASSED
    assert [case["pairs"] for case in _measured(result)] == [9, 9]
    assert stable.held_up_s < 0.007 * clock.now


@pytest.mark.parametrize(("ratio", "outcome"), [(1.0, Outcome.PASSED), (4.0, Outcome.FAILED)])
async def test_pauses_for_callers_leave_time_enough(ratio: float, outcome: Outcome) -> None:
    clock = Clock()
    stable, candidate = FakeProber(clock, 15_000.0, 0.0), FakeProber(clock, ratio * 15_000.0, 0.0)
    result = await _compare(stable, candidate, has_callers=lambda: True, limit_s=60.0)
    assert result.outcome is outcome
    assert clock.now < 40.0


async def test_one_slow_size_is_enough() -> None:
    clock = Clock()
    candidate = FakeProber(clock, us_per_call=900.0)
    result = await _compare(FakeProber(clock), candidate)
    assert result.outcome is Outcome.FAILED
    assert {rows for _, rows in candidate.calls} == {1}


async def test_a_slow_model_is_measured_nine_times_whatever_the_budget() -> None:
    clock = Clock()
    stable, candidate = FakeProber(clock, us_per_call=1e6), FakeProber(clock, us_per_call=1e6)
    result = await _compare(stable, candidate, sizes=(1,))
    assert _measured(result)[0]["pairs"] == 9
    assert len(stable.calls) == 10


@pytest.mark.parametrize(("us_per_row", "rows"), [(20.0, 32), (1000.0, 20), (5000.0, 4), (100_000.0, None)])
async def test_a_batch_is_no_longer_than_callers_may_have_to_wait(us_per_row: float, rows: int | None) -> None:
    clock = Clock()
    stable, candidate = FakeProber(clock, 0.0, us_per_row), FakeProber(clock, 0.0, us_per_row)
    result = await _compare(stable, candidate)
    assert result.outcome is Outcome.PASSED
    assert {count for _, count in stable.calls} == {1, rows} - {None}
    assert rows is not None or {count for _, count in candidate.calls} == {1}


class Cold(FakeProber):
    """Takes five times as long where the run before it was not its own, as with cold caches."""

    _ended = -1.0

    async def probe(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Probe:
        times = 1.0 if self.clock.now == self._ended else 5.0
        found = await super().probe(signature, inputs)
        self._ended = self.clock.now
        return Probe(found.engine_time_us * times, found.cpu_time_us * times)


async def test_a_candidate_that_finds_cold_caches_is_not_slow() -> None:
    clock = Clock()
    assert (await _compare(FakeProber(clock), Cold(clock))).outcome is Outcome.PASSED
    assert (await _compare(FakeProber(clock), Cold(clock, 500.0, 50.0))).outcome is Outcome.FAILED


async def test_what_is_not_batched_runs_as_it_was_published() -> None:
    clock = Clock()
    candidate = FakeProber(clock)
    await _compare(FakeProber(clock), candidate, batched=[])
    assert set(candidate.calls) == {("f", 3)}


async def test_skipped_without_anything_to_compare() -> None:
    clock = Clock()
    candidate = FakeProber(clock)
    without = await _compare(None, candidate)
    assert (without.outcome, without.reason) == (Outcome.SKIPPED, "there is no other version in charge to compare with")
    empty = await compare_speed(FakeProber(clock), candidate, {}, batched=[], sizes=(1,), max_ratio=2.0)
    assert empty.outcome is Outcome.SKIPPED
    assert "no golden inputs that the stable version takes too" in empty.reason
    assert not candidate.calls


async def test_who_fails_decides() -> None:
    clock = Clock()
    broken = FakeProber(clock, error=ModelFailureError("no such word"))
    skipped = await _compare(broken, FakeProber(clock))
    assert (skipped.outcome, skipped.reason) == (
        Outcome.SKIPPED,
        "the stable version can't be measured: no such word",
    )
    failed = await _compare(FakeProber(clock), FakeProber(clock, error=ModelFailureError("no")))
    assert (failed.outcome, failed.reason) == (Outcome.FAILED, "it fails on its golden inputs: no")


async def test_what_is_nobodys_fault_is_put_off() -> None:
    clock = Clock()
    absent = FakeProber(clock, error=NotAvailableError("the engine is not there"))
    full = FakeProber(clock, error=OverloadedError("the queue is full", retry_after_s=1.0))
    for stable, candidate, text in (
        (absent, FakeProber(clock), "the engine is not there"),
        (full, FakeProber(clock), "the queue is full"),
        (FakeProber(clock), full, "the queue is full"),
    ):
        with pytest.raises(NotMeasurableError, match=text):
            await _compare(stable, candidate)
    assert (await _compare(FakeProber(clock), absent)).outcome is Outcome.FAILED


class Slow(FakeProber):
    """One that really takes its time."""

    async def probe(self, signature: str, inputs: Mapping[str, NDArray[Any]]) -> Probe:
        await asyncio.sleep(self.us_per_call / 1e6)
        return Probe(self.us_per_call, self.us_per_call)


async def _measure_slow(stable_us: float, candidate_us: float) -> GateResult:
    clock = Clock()
    stable, candidate = Slow(clock, us_per_call=stable_us), Slow(clock, us_per_call=candidate_us)
    return await _compare(stable, candidate, clock=time.monotonic, limit_s=0.3, sizes=(1,))


async def test_a_limit_that_both_need_counts_what_was_measured() -> None:
    both = await _measure_slow(40_000.0, 40_000.0)
    assert (both.outcome, _measured(both)[0]["pairs"] < 9) == (Outcome.PASSED, True)
    slow = await _measure_slow(1_000.0, 3_600e6)
    assert (slow.outcome, slow.reason) == (Outcome.FAILED, "took more than 0.3 s")
    with pytest.raises(NotMeasurableError, match="the version in charge took more than"):
        await _measure_slow(3_600e6, 1_000.0)


async def test_at_most_three_signatures_are_measured() -> None:
    clock = Clock()
    candidate = FakeProber(clock)
    names = ["z", "a", "serving_default", "b", "c"]
    examples = dict.fromkeys(names, ROWS)
    await compare_speed(
        FakeProber(clock), candidate, examples, batched=list(examples), sizes=(1,), max_ratio=2.0, clock=clock
    )
    assert {name for name, _ in candidate.calls} == {"serving_default", "a", "b"}


def test_shared_examples_are_those_that_both_take() -> None:
    def specs(**dtypes: str) -> dict[str, SignatureSpec]:
        return {name: SignatureSpec(name, (TensorSpec("x", dtype, (None, 4)),), ()) for name, dtype in dtypes.items()}

    golden = [Golden(name, ROWS, {}) for name in ("same", "changed", "new")]
    shared = shared_examples(
        golden,
        specs(same="float32", changed="float64", old="float32"),
        specs(same="float32", changed="float32", new="float32"),
    )
    assert shared.keys() == {"same"}


def test_sizes() -> None:
    assert [probe_sizes(largest) for largest in (1, 2, 32, 128)] == [(1,), (1, 2), (1, 32), (1, 32)]
