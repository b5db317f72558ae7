"""A candidate's later times beside its first."""

from __future__ import annotations

import math

import numpy as np
import pytest

from modelport_server.rollout.evidence import BUCKETS, bucket_of, seconds_of
from modelport_server.rollout.times import Change, FirstTimes, Times, mean_of

SECONDS = np.array([seconds_of(bucket) for bucket in range(BUCKETS)])
Windows = list[tuple[list[float], list[float]]]
"""The stable version's and the candidate's times of each, in ms."""


def first_times(windows: Windows, length_s: float = 0.25) -> FirstTimes:
    stable, candidate = np.zeros((2, len(windows), BUCKETS))
    for window, both in enumerate(windows):
        for counts, times in zip((stable, candidate), both, strict=True):
            for time_ms in times:
                counts[window, bucket_of(time_ms / 1e3)] += 1
    return FirstTimes.of(Times(SECONDS, np.arange(len(windows)), stable, candidate), length_s)


def test_the_first_are_two_of_a_window_at_most() -> None:
    assert not first_times([([4.0] * 2, [8.0] * 3)] * 12).known
    first = first_times([([4.0] * 2, [8.0] * 3)] * 13)
    assert first.windows.tolist() == [12]
    assert first.usual == pytest.approx(2.0, rel=0.1)


def test_longer_windows_have_more_of_them() -> None:
    assert first_times([([4.0] * 8, [8.0] * 8)] * 4, 1.0).windows.tolist() == [3]


def test_a_burst_does_not_say_what_is_usual() -> None:
    quiet = [([4.0] * 2, [4.0] * 2)] * 11
    assert first_times([*quiet, ([4.0] * 2, [16.0] * 200), *quiet]).usual == pytest.approx(4 ** (1 / 12), rel=0.05)


def test_windows_of_one_version_alone_say_nothing() -> None:
    alone: Windows = [([], [80.0, 80.0]), ([4.0] * 2, [])]
    both: Windows = [([4.0] * 2, [4.0] * 2)] * 13
    first = first_times([*alone * 10, *both, *alone])
    assert first.usual == pytest.approx(1.0)
    assert first.windows.tolist() == [32]


def test_what_is_slow_for_both_is_no_change() -> None:
    first = first_times([*[([4.0] * 2, [6.0] * 2)] * 12, *[([16.0] * 2, [24.0] * 2)] * 12])
    change = first.change(12)
    assert change is not None
    assert change.difference == pytest.approx(0.0, abs=0.1)


def test_a_change_and_its_error_are_those_of_student() -> None:
    rng = np.random.default_rng(1)
    ratios = np.exp(rng.normal(0, 0.3, (30, 2)))
    ratios[18:] *= 2
    first = first_times([([4.0] * 9, (4.0 * pair).tolist()) for pair in ratios])
    change = first.change(18)
    assert change is not None
    before, now = np.log(ratios[:12]).ravel(), np.log(ratios[18:]).ravel()
    pooled = (23 * before.var(ddof=1) + 23 * now.var(ddof=1)) / 46
    assert change.freedom == 46
    assert change.difference == pytest.approx(now.mean() - before.mean(), abs=0.02)
    assert change.variance == pytest.approx(pooled * (1 / 24 + 1 / 24), rel=0.1)  # times are rounded to buckets
    assert change.usual == pytest.approx(before.mean(), abs=0.06)


def test_the_first_say_less_if_they_are_spread_more_widely() -> None:
    rng = np.random.default_rng(2)
    ratios = np.exp(np.concatenate([rng.normal(0, 0.5, (12, 2)), rng.normal(0, 0.1, (100, 2))]))
    first = first_times([([4.0] * 9, (4.0 * pair).tolist()) for pair in ratios])
    change = first.change(12)
    assert change is not None
    assert change.variance > np.log(ratios[:12]).var(ddof=1) / 24 * 0.95


def test_they_are_no_more_than_the_stable_versions() -> None:
    assert not first_times([([4.0], [8.0, 8.0])] * 24).known
    assert first_times([([4.0], [8.0, 8.0])] * 25).known


def test_times_that_are_far_off_are_not_made_more_of() -> None:
    windows = [([4.0] * 9, [4.0, 4.0])] * 12
    far, farther = (first_times([([4.0] * 9, [time_ms]), *windows, *windows]).usual for time_ms in (40.0, 400.0))
    assert far == farther == pytest.approx(8 ** (1 / 24), rel=0.05)


def test_the_mean_of_changes_is_that_of_independent_ones() -> None:
    mean = mean_of([Change(0.5, 0.2, 0.01, 30.0), Change(0.1, 0.8, 0.04, 50.0)])
    assert (mean.usual, mean.difference) == pytest.approx((0.42, 0.32))
    assert (mean.variance, mean.freedom) == pytest.approx((0.008, 80.0))
    # Student's statistic is 0.32 / sqrt(0.008), with 80 degrees of freedom.
    assert mean.log_likelihood_ratio == pytest.approx(40 * math.log(1 + 12.8 / 80))
    assert Change(0.0, -1.0, 0.01, 30.0).log_likelihood_ratio == 0.0


def test_there_is_no_change_after_the_last_window() -> None:
    assert first_times([([4.0] * 2, [4.0] * 2)] * 13).change(13) is None
