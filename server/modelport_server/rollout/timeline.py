"""Counts by window of time, so that two versions can be compared in what they did at the same moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW_S = 0.25
"""The shortest window, in seconds."""
MAX_WINDOWS = 512
_MIN_ROOM = 32
_LONG = 2
"""From this level on nobody waits for the end of a window."""

Whole = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """What a timeline had counted at a moment."""

    level: int
    """A window lasts ``WINDOW_S * 2**level`` seconds."""
    windows: Whole
    """Numbers of the windows that had something, ascending; one that is under way only if it is a long one."""
    counts: NDArray[np.int32]
    """A row for each window, a column for each thing that is counted."""
    totals: Whole
    """By column, with the window that is under way."""

    def at(self, level: int) -> Counts:
        """Returns the same in longer windows."""
        if level <= self.level:
            return self
        windows, counts = _merged(self.windows, self.counts, level - self.level)
        return Counts(level, windows, counts, self.totals)


def joined(several: Sequence[Counts]) -> Counts:
    """Returns what several timelines counted together, in windows as long as the longest of theirs."""
    level = max(one.level for one in several)
    parts = [one.at(level) for one in several]
    windows = np.unique(np.concatenate([one.windows for one in parts]))
    counts = np.zeros((len(windows), parts[0].counts.shape[1]), np.int32)
    for one in parts:
        counts[np.searchsorted(windows, one.windows)] += one.counts
    return Counts(level, windows, counts, np.sum([one.totals for one in several], axis=0))


class Timeline:
    """Counts things by window of time; whatever happens, in no more than ``MAX_WINDOWS`` windows.

    Args:
        columns: how many things are counted.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._level = 0
        self._used = 0
        self._windows: Whole = np.zeros(_MIN_ROOM, np.int64)
        self._counts = np.zeros((_MIN_ROOM, columns), np.int32)
        self._totals: Whole = np.zeros(columns, np.int64)
        self._window = -1
        self._row = [0] * columns

    def row(self, now_s: float) -> list[int]:
        """Returns the counts of the window that ``now_s`` is in, to add to at once."""
        window = int(now_s / WINDOW_S) >> self._level
        if window != self._window:
            self._turn(window)
        return self._row

    def _turn(self, window: int) -> None:
        """Puts the window that is over aside."""
        if any(self._row):
            if self._used == len(self._windows):
                self._make_room()
            self._windows[self._used] = self._window
            self._counts[self._used] = self._row
            self._totals += self._counts[self._used]
            self._used += 1
            self._row = [0] * self._columns
        self._window = window
        if self._used == MAX_WINDOWS:
            self._lengthen()

    def _make_room(self) -> None:
        self._windows = np.resize(self._windows, 2 * self._used)
        self._counts = np.resize(self._counts, (2 * self._used, self._columns))

    def _lengthen(self) -> None:
        """Doubles the length of the windows until half of the room is free."""
        while self._used > MAX_WINDOWS // 2:
            windows, counts = _merged(self._windows[: self._used], self._counts[: self._used], 1)
            self._used = len(windows)
            self._windows[: self._used] = windows
            self._counts[: self._used] = counts
            self._level += 1
            self._window >>= 1
        # The window under way may be the second half of the last: what it has counted so far is taken out again.
        if self._windows[self._used - 1] == self._window:
            self._used -= 1
            self._row = self._counts[self._used].tolist()
            self._totals -= self._counts[self._used]

    @property
    def totals(self) -> list[int]:
        """All counts by column."""
        return [int(total) + now for total, now in zip(self._totals.tolist(), self._row, strict=True)]

    def counts(self, now_s: float) -> Counts:
        """Returns what it has counted."""
        self.row(now_s)
        windows, counts = self._windows[: self._used], self._counts[: self._used]
        row = np.array(self._row, np.int32)
        totals = self._totals + row
        if self._level < _LONG or not any(self._row):
            return Counts(self._level, windows.copy(), counts.copy(), totals)
        return Counts(self._level, np.append(windows, self._window), np.vstack((counts, row)), totals)


def _merged(windows: Whole, counts: NDArray[np.int32], levels: int) -> tuple[Whole, NDArray[np.int32]]:
    longer = windows >> levels
    if not len(longer):
        return longer, counts
    firsts = np.flatnonzero(np.diff(longer, prepend=longer[0] - 1))
    return longer[firsts], np.add.reduceat(counts, firsts, axis=0, dtype=np.int32)
