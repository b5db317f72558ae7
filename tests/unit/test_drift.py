"""How far a version's own times and outputs moved, as what its successor may be allowed."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from modelport_server.rollout.drift import shift_drift, time_drift
from modelport_server.rollout.evidence import BATCHES, BUCKETS, LABELS, OTHER, ROWS, bucket_of
from modelport_server.rollout.timeline import Counts

WINDOWS = 240
CLASSES = np.zeros((LABELS + 2, 3))
CLASSES[LABELS, 0] = CLASSES[LABELS + 1, 1] = CLASSES[OTHER, 2] = 1.0


def _counts(rows: NDArray[np.int32]) -> Counts:
    used = np.flatnonzero(rows.any(axis=1))
    return Counts(0, used.astype(np.int64), rows[used], rows.sum(axis=0, dtype=np.int64))


def _times(seconds: NDArray[np.float64], batches: int = 10, spread: float = 0.3, seed: int = 0) -> Counts:
    rng = np.random.default_rng(seed)
    rows = np.zeros((len(seconds), BUCKETS), np.int32)
    for row, median in zip(rows, seconds, strict=True):
        for drawn in rng.lognormal(np.log(median), spread, batches):
            row[bucket_of(drawn)] += 1
    return _counts(rows)


def _mixes(shares: NDArray[np.float64], calls: float = 10.0, seed: int = 0) -> Counts:
    """Returns the counts of two classes, of which the first has these shares, in so many batches of a row a window."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((len(shares), LABELS + 2), np.int32)
    rows[:, BATCHES] = rows[:, ROWS] = rng.poisson(calls, len(shares))
    rows[:, LABELS] = rng.binomial(rows[:, ROWS], shares)
    rows[:, LABELS + 1] = rows[:, ROWS] - rows[:, LABELS]
    return _counts(rows)


def _most(found: list[float]) -> float:
    """Returns what nine of ten are at most."""
    return float(np.quantile(found, 0.9))


EVEN = np.full(WINDOWS, 0.5)
STEADY = np.full(WINDOWS, 0.004)


@pytest.mark.parametrize("batches", [1, 10])
def test_times_that_do_not_drift_may_not_become_longer(batches: int) -> None:
    assert _most([time_drift(_times(STEADY, batches, seed=seed)) for seed in range(20)]) < 1.02


def test_short_slow_times_are_no_drift() -> None:
    seconds = STEADY.copy()
    seconds[::8] = 0.016
    assert time_drift(_times(seconds)) < 1.02


@pytest.mark.parametrize("way", [1, -1])
def test_times_that_drifted_either_way_may_go_farther(way: int) -> None:
    allowed = time_drift(_times(0.004 * 1.2 ** np.linspace(-way, way, WINDOWS)))
    assert 1.3 < allowed < 2.5


def test_times_that_drifted_far_may_not_go_anywhere() -> None:
    assert time_drift(_times(0.004 * 10 ** np.linspace(-1, 1, WINDOWS))) == 3.0


def test_a_short_time_says_nothing_of_drift() -> None:
    assert time_drift(_times(0.004 * 2 ** np.linspace(0, 1, 15))) == 1.0
    assert time_drift(_counts(np.zeros((WINDOWS, BUCKETS), np.int32))) == 1.0
    assert shift_drift(_counts(np.zeros((WINDOWS, LABELS + 2), np.int32)), CLASSES, 0.3) == 0.3


@pytest.mark.parametrize("calls", [0.5, 1.0, 10.0])
def test_a_mix_that_does_not_drift_may_shift_as_far_as_any(calls: float) -> None:
    allowed = [shift_drift(_mixes(EVEN, calls, seed), CLASSES, 0.3) for seed in range(40)]
    assert min(allowed) >= 0.3
    assert _most(allowed) < 0.35


def test_a_mix_that_drifted_may_shift_farther() -> None:
    assert shift_drift(_mixes(np.linspace(0.45, 0.55, WINDOWS), 100.0), CLASSES, 0.3) > 0.35


@pytest.mark.parametrize("end", [0.6, 1.0])
def test_a_single_class_is_too_far_from_any_mix(end: float) -> None:
    counts = _mixes(np.linspace(0.0, end, WINDOWS), 100.0)
    usual = counts.totals @ CLASSES / counts.totals[ROWS]
    assert shift_drift(counts, CLASSES, 0.2) < 1 - usual.max()
    assert shift_drift(counts, CLASSES, 0.95) == 0.95
