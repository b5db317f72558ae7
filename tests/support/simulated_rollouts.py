"""Simulated steps of rollouts: what two versions did, window by window, drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from modelport_server.rollout.evidence import (
    BATCHES,
    BROKEN,
    BUCKETS,
    CALLS,
    FAILED,
    LABELS,
    ROWS,
    TIMES,
    EvidenceSnapshot,
    OutputCounts,
    seconds_of,
)
from modelport_server.rollout.timeline import WINDOW_S, Counts

Floats = NDArray[np.float64]
_SECONDS = np.array([seconds_of(bucket) for bucket in range(BUCKETS)])
_LOG_SECONDS = np.log(_SECONDS)
CLASSES = 10
_FEW, _SELDOM_PER_S = 0.4, 200.0
"""A candidate with a smaller share of the calls, and fewer of them in a second, is cold."""
_SIZE, _LARGER_SIZE = 2, 8
"""Of batches, in rows."""
_LARGER = 1.3
"""How many times as long a larger batch takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong with a candidate from some moment on."""

    at_s: float = 0.0
    errors: float = 0.0
    """The share of its calls that fail."""
    slower: float = 1.0
    """How many times as long it takes."""
    one_class: float = 0.0
    """The share of the rows that it gives the same class."""
    non_finite: float = 0.0
    """The share of the rows that it answers with NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The traffic of a step, and what both versions have in common."""

    calls_per_s: float = 1000.0
    share: float = 0.01
    """The candidate's, of the calls."""
    seconds: float = 60.0
    median_s: float = 0.004
    spread: float = 0.3
    """The standard deviation of the logarithm of the times."""
    together: int = 1
    """How many calls in a row take the same time, as those of one batch do."""
    slow_share: float = 0.0
    """The share of the time in which everything takes several times as long."""
    slow_s: float = 2.0
    """How long such a time lasts on average."""
    slow_factor: float = 4.0
    cold: float = 1.0
    """How many times as long the candidate takes while it has far fewer calls than the stable version."""
    alike: float = 1.0
    """The share of the stable version's batches that are as small as the candidate's."""
    errors: float = 0.0
    """The share of the calls that fail, of either version."""
    errors_when_slow: float = 0.0
    drift: float = 0.0
    """How far the traffic, the times and the mix of classes wander."""
    even: float = 100.0
    """How even the classes are: the parameter of a Dirichlet distribution."""
    fault: Fault = field(default_factory=Fault)


@dataclass(frozen=True, slots=True)
class Look:
    """What is known at a moment."""

    at_s: float
    stable: EvidenceSnapshot
    candidate: EvidenceSnapshot


@dataclass(frozen=True, slots=True)
class _Done:
    """What one version did in every window."""

    calls: NDArray[np.int32]
    engine: NDArray[np.int32]
    larger: NDArray[np.int32]
    outputs: NDArray[np.int32]

    def until(self, windows: int) -> EvidenceSnapshot:
        return EvidenceSnapshot(
            calls=_counts(self.calls, windows),
            engine={
                ("serving_default", size): _counts(times, windows)
                for size, times in ((_SIZE, self.engine), (_LARGER_SIZE, self.larger))
                if times[:windows].any()
            },
            outputs={
                ("serving_default", "scores"): OutputCounts(
                    tuple(range(CLASSES)), False, _counts(self.outputs, windows)
                )
            },
        )


def _counts(all_of: NDArray[np.int32], windows: int) -> Counts:
    counts = all_of[:windows]
    used = np.flatnonzero(counts.any(axis=1))
    return Counts(0, used.astype(np.int64), counts[used], counts.sum(axis=0, dtype=np.int64))


def looks(world: World, rng: np.random.Generator, every: int = 1) -> Iterator[Look]:
    """Yields what is known at the end of every window, or of every so many."""
    windows = int(world.seconds / WINDOW_S)
    stable, candidate = _simulate(world, np.full(windows, world.share), rng)
    for window in range(every, windows + 1, every):
        yield Look(window * WINDOW_S, stable.until(window), candidate.until(window))


def watch_looks(world: World, rng: np.random.Generator, every: int = 1) -> Iterator[Look]:
    """Yields the same of a candidate that has all calls, after the stable version had them for as long."""
    windows = int(world.seconds / WINDOW_S)
    stable, candidate = _simulate(world, np.repeat([0.0, 1.0], windows), rng)
    before = stable.until(windows)
    for window in range(every, windows + 1, every):
        yield Look(window * WINDOW_S, before, candidate.until(windows + window))


def _simulate(world: World, share: Floats, rng: np.random.Generator) -> tuple[_Done, _Done]:
    windows = len(share)
    wander = np.cumsum(rng.normal(0, world.drift * 0.1, (windows, 2)), axis=0)
    calls = rng.poisson(world.calls_per_s * WINDOW_S * np.exp(wander[:, 0].clip(-2, 1)))
    slow = _episodes(world, windows, rng)
    median = np.log(world.median_s) + wander[:, 1].clip(-1, 1) + slow * np.log(world.slow_factor)
    failing = np.where(slow > 0, max(world.errors_when_slow, world.errors), world.errors)
    mix = _mixes(world, windows, rng)
    mine = rng.binomial(calls, share)
    few = (share < _FEW) & (share * world.calls_per_s < _SELDOM_PER_S)
    good = replace(world, fault=Fault())
    return (
        _version(good, calls - mine, median, failing, mix, rng),
        _version(replace(world, alike=1.0), mine, median + few * np.log(world.cold), failing, mix, rng),
    )


def _episodes(world: World, windows: int, rng: np.random.Generator) -> Floats:
    """Returns 1 for the windows of slow times, else 0."""
    state = np.zeros(windows)
    leave = WINDOW_S / world.slow_s
    enter = leave * world.slow_share / max(1 - world.slow_share, 1e-9)
    now = 0.0
    for window, draw in enumerate(rng.random(windows)):
        if draw < (leave if now else enter):
            now = 1.0 - now
        state[window] = now
    return state


def _mixes(world: World, windows: int, rng: np.random.Generator) -> Floats:
    logs = np.log(rng.dirichlet(np.full(CLASSES, world.even)) + 1e-9)
    logs = logs + np.cumsum(rng.normal(0, 0.1 * world.drift, (windows, CLASSES)), axis=0)
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    mixes: Floats = weights / weights.sum(axis=1, keepdims=True)
    return mixes


def _version(
    world: World, calls: NDArray[np.int64], median: Floats, failing: Floats, mix: Floats, rng: np.random.Generator
) -> _Done:
    bad = np.arange(len(calls)) * WINDOW_S >= world.fault.at_s
    failed = rng.binomial(calls, 1 - (1 - failing) * (1 - bad * world.fault.errors))
    median = median + bad * np.log(world.fault.slower)
    done = np.zeros((len(calls), TIMES + BUCKETS), np.int32)
    done[:, CALLS], done[:, FAILED] = calls, failed
    done[:, TIMES:] = _times(calls - failed, median + np.log(1.5), world, rng)
    small = rng.binomial(calls - failed, world.alike) if world.alike < 1 else calls - failed
    engine = _times(small, median, world, rng)
    larger = _times(calls - failed - small, median + np.log(_LARGER), world, rng)
    outputs = np.zeros((len(calls), LABELS + 64), np.int32)
    answered = calls - failed
    broken = rng.binomial(answered, bad * world.fault.non_finite)
    forced = rng.binomial(answered - broken, bad * world.fault.one_class)
    outputs[:, ROWS], outputs[:, BROKEN] = answered, broken
    outputs[:, BATCHES] = -(-answered // world.together)
    outputs[:, LABELS : LABELS + CLASSES] = rng.multinomial(answered - broken - forced, mix)
    outputs[:, LABELS] += forced.astype(np.int32)
    return _Done(done, engine, larger, outputs)


def _times(calls: NDArray[np.int64], median: Floats, world: World, rng: np.random.Generator) -> NDArray[np.int32]:
    scores = (_LOG_SECONDS[np.newaxis, :] - median[:, np.newaxis]) / world.spread
    weights = np.exp(-0.5 * scores**2) + 1e-300
    weights /= weights.sum(axis=1, keepdims=True)
    whole, rest = calls // world.together, calls % world.together
    counts = world.together * rng.multinomial(whole, weights) + rest[:, np.newaxis] * rng.multinomial(1, weights)
    return counts.astype(np.int32)
