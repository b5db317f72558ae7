"""How far a version's own times and outputs drifted: what may go on to do so is no sign against its successor.

After a promotion nothing is left to compare with at the same time. What the stable version did is cut into a few
stretches of equal length, and how far they lie from all of it together, beyond what chance explains, says
how restless callers and machine are (``docs/adr/0048``).
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np

from modelport_server.rollout.evidence import BATCHES, BUCKETS_PER_OCTAVE, seconds_of
from modelport_server.rollout.sequential import Floats
from modelport_server.rollout.timeline import Counts, Whole

_FARTHER = 5.0
"""How many standard deviations of the stretches it may go on to. A random walk that is followed for as long again gets
farther, for a fifth of that time, in one case of ten; what returns to where it was seldom does."""
_STRETCHES = 8
_SURE = 2.0
"""How many times the variance that chance explains is left out: where nothing drifts, chance alone has so much of it in
one case of twenty (the distribution of chi squared over its 7 degrees of freedom)."""
_BUCKET = math.log(2.0) / BUCKETS_PER_OCTAVE
_MOST_SLOWER = 3.0
_MOST_SHIFT = 0.7
"""The part of the way to a single category that it may go at most: however restless all was, that is a fault."""


@lru_cache(maxsize=32)  # what a watch compares with stays the same, and callers wait meanwhile
def time_drift(counts: Counts) -> float:
    """Returns how many times as long batches may come to take, 1 or more, by how their median has drifted so far.

    Args:
        counts: histograms of times.
    """
    medians: list[float] = []
    chance: list[float] = []
    for stretch in _stretches(counts):
        off = 0.5 / math.sqrt(float(stretch.sum()))  # one standard deviation
        medians.append(_log_quantile(stretch, 0.5))
        chance.append((_log_quantile(stretch, min(0.5 + off, 1.0)) - _log_quantile(stretch, max(0.5 - off, 0.0))) / 2)
    if not medians:
        return 1.0
    drift = _beyond_chance(float(np.var(medians, ddof=1)), float(np.square(chance).mean()))
    return min(math.exp(_FARTHER * drift), _MOST_SLOWER)


def shift_drift(counts: Counts, categories: Floats, max_shift: float) -> float:
    """Returns which share of the rows may be of other categories, by how their mix has drifted so far.

    Args:
        counts: what ``OutputCounts`` has of an output.
        categories: makes counts of categories of its columns.
        max_shift: which share may where nothing drifts.
    """
    stretches = _stretches(counts)
    if not stretches:
        return max_shift
    usual = _mix(counts.totals, categories)
    variances: Floats = np.var([_mix(stretch, categories) for stretch in stretches], axis=0, ddof=1)
    chance = float((usual * (1 - usual)).sum()) * float(
        np.mean([1 / max(stretch[BATCHES], 1) for stretch in stretches])
    )
    total = float(variances.sum())
    # The total variation distance, less the part of it that chance explains.
    distance = float(np.sqrt(variances).sum()) / 2 * _beyond_chance(total, chance) / max(math.sqrt(total), 1e-12)
    room = max(1.0 - float(usual.max()) - max_shift, 0.0)
    return max_shift + min(_FARTHER * distance, _MOST_SHIFT * room)


def _beyond_chance(variance: float, chance: float) -> float:
    """Returns the standard deviation of what chance does not explain."""
    return math.sqrt(max(variance - _SURE * chance, 0.0))


def _log_quantile(histogram: Whole, share: float) -> float:
    """Returns the logarithm of the time below which a share lies, as if times were spread evenly over their bucket."""
    below = np.cumsum(histogram)
    at = share * float(below[-1])
    bucket = min(int(np.searchsorted(below, at)), int(np.flatnonzero(histogram)[-1]))
    inside = 1 - (float(below[bucket]) - at) / max(float(histogram[bucket]), 1.0)
    return math.log(seconds_of(bucket)) + (inside - 0.5) * _BUCKET


def _mix(counts: Whole, categories: Floats) -> Floats:
    sums: Floats = counts.astype(np.float64) @ categories
    return sums / max(float(sums.sum()), 1.0)


def _stretches(counts: Counts) -> list[Whole]:
    """Returns the counts of stretches of equal length, of those that had something."""
    windows = counts.windows
    if len(windows) < 2 * _STRETCHES:
        return []
    first, length = int(windows[0]), int(windows[-1]) + 1 - int(windows[0])
    edges = [first + length * number // _STRETCHES for number in range(_STRETCHES + 1)]
    places: list[int] = np.searchsorted(windows, edges).tolist()
    sums = [counts.counts[begin:end].sum(axis=0, dtype=np.int64) for begin, end in pairwise(places)]
    return [counted for counted in sums if counted.any()]
