"""Times of both versions in the same windows, and whether a candidate's have become longer than its first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelport_server.rollout.evidence import BUCKETS_PER_OCTAVE
from modelport_server.rollout.sequential import Floats
from modelport_server.rollout.timeline import WINDOW_S, Whole

TIME_UNITS = 2.0
"""How many independent ones the times of a shortest window count for at most: calls of one batch take the same, and one
cause slows several batches."""
_SLACK = 1e-9
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

    usual: float
    """The mean of the first ones' logarithms, each as a part of the stable version's."""
    difference: float
    """By how much the mean of the later ones' is larger."""
    variance: float
    """The difference's."""
    freedom: float
    """How many degrees of freedom the variance has."""

    @property
    def log_likelihood_ratio(self) -> float:
        """The logarithm of how much likelier it is, if there is a change, than if there is none; 0 if it is below."""
        return self.freedom / 2 * math.log1p(max(self.difference, 0.0) ** 2 / self.variance / self.freedom)


def mean_of(changes: Sequence[Change]) -> Change:
    """Returns the mean of several changes that are independent, by how well each is known."""
    weights = np.array([1 / change.variance for change in changes])
    usual = float(np.average([change.usual for change in changes], weights=weights))
    difference = float(np.average([change.difference for change in changes], weights=weights))
    return Change(usual, difference, 1 / float(weights.sum()), sum(change.freedom for change in changes))


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
        # No more than the stable version's, whose median is no better known.
        most = np.minimum(TIME_UNITS * length_s / WINDOW_S, times.stable.sum(axis=1))
        shares = np.minimum(1.0, most / np.maximum(times.candidate.sum(axis=1), 1.0))
        weights = times.candidate * shares[:, np.newaxis]
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
        return int(np.searchsorted(self.count, _FIRST_TIMES - _SLACK)) + 1

    def change(self, begin: int) -> Change | None:
        """Returns how the times from window ``begin`` on differ from the first; None if there are none."""
        place = max(int(np.searchsorted(self.times.windows, begin)), self._first)
        if place >= len(self.count):
            return None
        first = self._first - 1
        n1, n2 = self.count[first], self.count[-1] - self.count[place - 1]
        sum1, sum2 = self.total[first], self.total[-1] - self.total[place - 1]
        squares1, squares2 = (
            self.squares[first] - sum1**2 / n1,
            self.squares[-1] - self.squares[place - 1] - sum2**2 / n2,
        )
        freedom = n1 + n2 - 2
        pooled = max((squares1 + squares2) / freedom, _ROUNDED)
        # The first may be spread more widely, so that they say less.
        variance = max(squares1 / (n1 - 1), pooled) / n1 + pooled / n2
        return Change(sum1 / n1, sum2 / n2 - sum1 / n1, variance, freedom)
