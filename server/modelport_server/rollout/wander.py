"""How far a version's own times and outputs wandered: what may go on to do so is no sign against its successor.

After a promotion nothing is left to compare with at the same time. What the stable version did is cut into a few
stretches of equal length, and how far they lie from all of it together, beyond what chance explains, says
how restless callers and machine are. A random walk that is followed for as long again goes farther than ``_FARTHER``
times that, for a fifth of the time, in one case of ten; whatever returns to where it was seldom does.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from modelport_server.rollout.evidence import BATCHES, quantile
from modelport_server.rollout.sequential import Floats
from modelport_server.rollout.timeline import Counts, Whole

_FARTHER = 3.0
_STRETCHES = 8
_MOST_SLOWER = 3.0
_MOST_SHIFT = 0.9
"""However restless all was: more than this is another version's doing."""
_TIME_UNITS = 2.0
"""How many independent times a window counts for at most."""


def time_wander(counts: Counts) -> float:
    """Returns how many times as long batches may come to take, 1 or more, by how their median has moved so far.

    Args:
        counts: histograms of times.
    """
    middle = quantile(counts.totals, 0.5)
    if not middle:
        return 1.0
    farthest = 0.0
    for windows, stretch in _stretches(counts):
        chance = 1.0 / math.sqrt(min(float(stretch.sum()), _TIME_UNITS * windows))  # two standard deviations
        low, high = (quantile(stretch, min(max(0.5 + way * chance, 0.0), 1.0)) for way in (-1, 1))
        farthest = max(farthest, math.log(low / middle), math.log(middle / high))
    return min(math.exp(_FARTHER * farthest), _MOST_SLOWER)


def shift_wander(counts: Counts, categories: Floats, max_shift: float) -> float:
    """Returns which share of the rows may be of other categories, by how they have moved so far.

    Args:
        counts: what ``OutputCounts`` has of an output.
        categories: makes counts of categories of its columns.
        max_shift: which share may where nothing moves.
    """
    usual = _mix(counts.totals, categories)
    farthest = 0.0
    for _, stretch in _stretches(counts):
        chance = float(np.sqrt(usual * (1 - usual) / max(float(stretch[BATCHES]), 1.0)).sum()) / 2
        farthest = max(farthest, float(np.maximum(_mix(stretch, categories) - usual, 0.0).sum()) - chance)
    return max(min(max_shift + _FARTHER * farthest, _MOST_SHIFT), max_shift)


def _mix(counts: Whole, categories: Floats) -> Floats:
    sums: Floats = counts.astype(np.float64) @ categories
    return sums / max(float(sums.sum()), 1.0)


def _stretches(counts: Counts) -> list[tuple[int, Whole]]:
    """Returns stretches of equal length that had something: of how many windows, and their counts."""
    windows = counts.windows
    if len(windows) < 2 * _STRETCHES:
        return []
    first, length = int(windows[0]), int(windows[-1]) + 1 - int(windows[0])
    edges = [first + length * number // _STRETCHES for number in range(_STRETCHES + 1)]
    places: list[int] = np.searchsorted(windows, edges).tolist()
    return [
        (end - begin, counts.counts[begin:end].sum(axis=0, dtype=np.int64))
        for begin, end in pairwise(places)
        if end > begin
    ]
