"""How far a version's own times and outputs moved, as what its successor may be allowed."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from modelport_server.rollout.evidence import BATCHES, BUCKETS, LABELS, OTHER, ROWS, bucket_of
from modelport_server.rollout.timeline import Counts
from modelport_server.rollout.wander import shift_wander, time_wander

WINDOWS = 240
CLASSES = np.zeros((LABELS + 2, 3))
CLASSES[LABELS, 0] = CLASSES[LABELS + 1, 1] = CLASSES[OTHER, 2] = 1.0


def _counts(rows: NDArray[np.int32]) -> Counts:
    used = np.flatnonzero(rows.any(axis=1))
    return Counts(0, used.astype(np.int64), rows[used], rows.sum(axis=0, dtype=np.int64))


def _times(seconds: NDArray[np.float64], batches: int = 10, spread: float = 0.3) -> Counts:
    rng = np.random.default_rng(0)
    rows = np.zeros((len(seconds), BUCKETS), np.int32)
    for row, median in zip(rows, seconds, strict=True):
        for drawn in rng.lognormal(np.log(median), spread, batches):
            row[bucket_of(drawn)] += 1
    return _counts(rows)


def _mixes(shares: NDArray[np.float64], batches: int = 10) -> Counts:
    """Returns the counts of two classes, of which the first has these shares."""
    rows = np.zeros((len(shares), LABELS + 2), np.int32)
    rows[:, BATCHES] = batches
    rows[:, ROWS] = 10 * batches
    rows[:, LABELS] = np.round(10 * batches * shares)
    rows[:, LABELS + 1] = 10 * batches - rows[:, LABELS]
    return _counts(rows)


@pytest.mark.parametrize("batches", [1, 10])
def test_steady_times_may_not_become_longer(batches: int) -> None:
    assert time_wander(_times(np.full(WINDOWS, 0.004), batches)) == pytest.approx(1.0, abs=0.05)


def test_short_slow_times_are_no_wandering() -> None:
    seconds = np.full(WINDOWS, 0.004)
    seconds[::8] = 0.016
    assert time_wander(_times(seconds)) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("way", [1, -1])
def test_times_that_wandered_either_way_may_go_farther(way: int) -> None:
    allowed = time_wander(_times(0.004 * 1.3 ** np.linspace(-way, way, WINDOWS)))
    assert 1.3 < allowed < 2.5


def test_times_that_went_far_are_not_followed_anywhere() -> None:
    assert time_wander(_times(0.004 * 10 ** np.linspace(-1, 1, WINDOWS))) == 3.0


def test_a_short_time_says_nothing_of_wandering() -> None:
    assert time_wander(_times(0.004 * 2 ** np.linspace(0, 1, 15))) == 1.0
    assert time_wander(_counts(np.zeros((WINDOWS, BUCKETS), np.int32))) == 1.0


def test_a_steady_mix_may_shift_as_far_as_ever() -> None:
    assert shift_wander(_mixes(np.full(WINDOWS, 0.5)), CLASSES, 0.3) == 0.3
    draws = np.random.default_rng(0).binomial(1, 0.5, WINDOWS).astype(np.float64)
    assert shift_wander(_mixes(draws, 1), CLASSES, 0.3) == pytest.approx(0.3, abs=0.1)


def test_a_mix_that_wandered_may_shift_farther_but_not_to_a_single_class() -> None:
    allowed = shift_wander(_mixes(np.linspace(0.4, 0.6, WINDOWS)), CLASSES, 0.3)
    assert 0.35 < allowed < 0.7
    assert shift_wander(_mixes(np.linspace(0.0, 1.0, WINDOWS)), CLASSES, 0.3) == 0.9
    assert shift_wander(_mixes(np.linspace(0.0, 1.0, WINDOWS)), CLASSES, 0.95) == 0.95
