"""Times of both versions in the same windows, and whether a candidate's have become longer than its first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from modelport_server.rollout.evidence import BUCKETS_PER_OCTAVE
from modelport_server.rollout.sequential import Floats
from modelport_server.rollout.timeline import WINDOW_S, Whole

TIME_UNITS = 2.0
"""How many independent ones the times of a shortest window count for at most: calls of one batch take the same, and one
cause slows several batches."""
_FIRST_TIMES = 24
"""How many independent ones are the first: they say what a cold engine takes."""
_MOST_APART = math.log(8.0)
"""More than so far from the stable version's, up or down, is counted as so far."""
_ROUNDED = (math.log(2.0) / BUCKETS_PER_OCTAVE) ** 2 / 12
"""The variance of a time's logarithm for its being counted in a bucket."""


@dataclass(frozen=True, slots=True)
class Times:
    """Histograms of both versions' times, window by window."""

    seconds: Floats
    """The times of the columns."""
    windows: Whole
    stable: Floats
    candidate: Floats

    def since(self, first: int) -> Times:
        """Returns those of the windows from ``first`` on."""
        keep = self.windows >= first
        return Times(self.seconds, self.windows[keep], self.stable[keep], self.candidate[keep])


@dataclass(frozen=True, slots=True)
class Change:
    """How later times differ from the first."""

    difference: float
    """Of the means of the logarithms."""
    variance: float
    """The difference's."""
    freedom: float
    """How many degrees of freedom the variance has."""
    now: float
    """The geometric mean of the later times, as parts of the stable version's."""


@dataclass(frozen=True, slots=True)
class FirstTimes:
    """A candidate's first times and those since, each as a part of the stable version's median of its window.

    Sums of their logarithms, from the first window on; windows in which only one version has times are left out.
    """

    times: Times
    count: Floats
    """How many independent ones there are up to and with each window."""
    total: Floats
    squares: Floats

    @classmethod
    def of(cls, times: Times, length_s: float) -> FirstTimes:
        """Returns those of times in windows of ``length_s`` seconds."""
        both = (times.stable.sum(axis=1) > 0) & (times.candidate.sum(axis=1) > 0)
        times = Times(times.seconds, times.windows[both], times.stable[both], times.candidate[both])
        below = times.stable.cumsum(axis=1)
        middles = times.seconds[(below >= below[:, -1:] / 2).argmax(axis=1), np.newaxis]
        logs = np.clip(np.log(times.seconds / middles), -_MOST_APART, _MOST_APART)
        most = TIME_UNITS * length_s / WINDOW_S
        weights = times.candidate * np.minimum(1.0, most / np.maximum(times.candidate.sum(axis=1, keepdims=True), 1.0))
        sums = (weights, weights * logs, weights * logs**2)
        return cls(times, *(one.sum(axis=1).cumsum() for one in sums))

    @property
    def windows(self) -> Whole:
        """The windows of the later times."""
        return self.times.windows[self._first :]

    @property
    def known(self) -> bool:
        """Whether there are later times, so that the first are complete."""
        return len(self.windows) > 0

    @property
    def usual(self) -> float:
        """The geometric mean of the first, where they are complete."""
        return math.exp(self.total[self._first - 1] / self.count[self._first - 1])

    @property
    def _first(self) -> int:
        return int(np.searchsorted(self.count, _FIRST_TIMES)) + 1

    def change(self, begin: int) -> Change | None:
        """Returns how the times from window ``begin`` on differ from the first; None if there are none."""
        place = max(int(np.searchsorted(self.times.windows, begin)), self._first)
        if place >= len(self.count):
            return None
        first = self._first - 1
        n1, n2 = self.count[first], self.count[-1] - self.count[place - 1]
        sum1, sum2 = self.total[first], self.total[-1] - self.total[place - 1]
        squares = self.squares[first] + self.squares[-1] - self.squares[place - 1]
        freedom = n1 + n2 - 2
        variance = max((squares - sum1**2 / n1 - sum2**2 / n2) / freedom, _ROUNDED) * (1 / n1 + 1 / n2)
        return Change(sum2 / n2 - sum1 / n1, variance, freedom, math.exp(sum2 / n2))
