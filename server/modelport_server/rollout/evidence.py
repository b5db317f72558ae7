"""Evidence: what a version's calls and batches were like while a step of a rollout lasted.

It is written on the way of every call, so that it counts and does little else: times go into histograms
of logarithmic buckets, outputs into counts of categories, and of busy versions only some batches are
looked into. Everything is counted by windows of time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from modelport_server.errors import ModelFailureError, OverloadedError
from modelport_server.outputs import NON_FINITE, categories
from modelport_server.rollout.status import Traffic
from modelport_server.rollout.timeline import WINDOW_S, Counts, Timeline
from modelport_server.tensors import RawTensor

BUCKETS_PER_OCTAVE = 8
BUCKETS = 26 * BUCKETS_PER_OCTAVE
"""From a microsecond to a minute."""
CALLS, FAILED, CALLER_FAULTS, CANCELLED, TIMES = range(5)
"""The columns of the calls; the buckets of their times begin at the last."""
_KEPT = {"calls": CALLS, "failed": FAILED, "caller_faults": CALLER_FAULTS}
"""What is kept of a version's calls with a rollout, and their columns."""
BATCHES, ROWS, BROKEN, OTHER, LABELS = range(5)
"""The columns of an output; those of its categories begin at the last."""
_MAX_LABELS = 64
_MAX_SIZES = 32
_MAX_OUTPUTS = 16
_LOOKS_PER_WINDOW = 32
_RATE_WINDOWS = 20
_STALL_S = 1.0


class Outcome(Enum):
    """How a call ended."""

    ANSWERED = "answered"
    FAILED = "failed"
    """The model or its engine failed, or the call expired before it ran."""
    CALLER_FAULT = "caller fault"
    """The model blamed the inputs."""
    CANCELLED = "cancelled"
    """The caller left."""


def outcome_of(error: BaseException) -> Outcome | None:
    """Returns how a call ended that failed with ``error``; None where that says nothing about the version."""
    if isinstance(error, OverloadedError):
        return None
    if isinstance(error, ModelFailureError) and error.caller_fault:
        return Outcome.CALLER_FAULT
    return Outcome.FAILED


def bucket_of(seconds: float) -> int:
    """Returns the bucket of a time: the whole part of its logarithm of base 2 ** (1/8), in microseconds."""
    if seconds <= 1e-6:
        return 0
    return min(int(math.log2(seconds * 1e6) * BUCKETS_PER_OCTAVE), BUCKETS - 1)


def seconds_of(bucket: int) -> float:
    """Returns the middle of a bucket, in seconds."""
    return float(2 ** ((bucket + 0.5) / BUCKETS_PER_OCTAVE) / 1e6)


def quantile(histogram: Sequence[int] | NDArray[np.int64], share: float) -> float:
    """Returns the time below which ``share`` of a histogram lies, in seconds; 0 without any."""
    below: NDArray[np.int64] = np.cumsum(histogram, dtype=np.int64)
    if not len(below) or not below[-1]:
        return 0.0
    return seconds_of(int(np.searchsorted(below, share * int(below[-1]))))


def size_of(rows: int) -> int:
    """Returns which batches a batch can be compared with: two sizes to a factor of 2."""
    bits = rows.bit_length()
    return 2 * bits + (bits > 1 and bool(rows >> (bits - 2) & 1))


@dataclass(frozen=True, slots=True)
class OutputCounts:
    """What an output was like."""

    labels: tuple[int, ...]
    """The categories that have columns, from ``LABELS`` on."""
    full: bool
    """Whether there were more, which are counted as others."""
    counts: Counts


@dataclass(frozen=True, slots=True)
class EvidenceSnapshot:
    """What had been seen at a moment."""

    calls: Counts
    """Calls that were answered or failed, and the times of all but those that failed."""
    engine: Mapping[tuple[str, int], Counts]
    """The engine's times for batches, by signature and size."""
    outputs: Mapping[tuple[str, str], OutputCounts]
    """By signature and output."""
    oldest_wait_s: float = 0.0
    """How long the oldest call under way has been so while no other call ended."""

    @classmethod
    def of_totals(cls, totals: Mapping[str, int]) -> EvidenceSnapshot:
        """Returns what is left of a snapshot that was kept as ``totals``: how many calls failed of how many."""
        counts = np.zeros(TIMES + BUCKETS, np.int64)
        for name, column in _KEPT.items():
            counts[column] = totals.get(name, 0)
        return cls(Counts(0, np.zeros(0, np.int64), np.zeros((0, len(counts)), np.int32), counts), {}, {})

    def with_totals(self, totals: Mapping[str, int]) -> EvidenceSnapshot:
        """Returns it with how many calls failed of how many taken from ``totals``, if that counts more of them."""
        if totals.get("calls", 0) <= self.ended:
            return self
        counts = self.calls.totals.copy()
        for name, column in _KEPT.items():
            counts[column] = totals.get(name, 0)
        return replace(self, calls=replace(self.calls, totals=counts))

    def totals(self) -> dict[str, int]:
        """Returns the little of it that is kept with a rollout, for servers that start again."""
        return {name: int(self.calls.totals[column]) for name, column in _KEPT.items()}

    @property
    def ended(self) -> int:
        """How many calls were answered or failed."""
        return int(self.calls.totals[CALLS])

    @property
    def times(self) -> NDArray[np.int64]:
        """The histogram of the calls' times."""
        return self.calls.totals[TIMES:]


class _Output:
    """Counts one output's categories."""

    def __init__(self) -> None:
        self._timeline = Timeline(LABELS + _MAX_LABELS)
        self._columns: dict[int, int] = {NON_FINITE: BROKEN}
        self._full = False

    def add(self, found: Sequence[int], now_s: float) -> None:
        row, columns = self._timeline.row(now_s), self._columns
        row[BATCHES] += 1
        row[ROWS] += len(found)
        for label in found:
            column = columns.get(label)
            if column is None:
                column = self._new(label)
            row[column] += 1

    def _new(self, label: int) -> int:
        if len(self._columns) > _MAX_LABELS:
            self._full = True
            return OTHER
        self._columns[label] = column = LABELS + len(self._columns) - 1
        return column

    def counts(self, now_s: float) -> OutputCounts:
        return OutputCounts(tuple(self._columns)[1:], self._full, self._timeline.counts(now_s))


class Evidence:
    """Counts one servable's calls and batches.

    Args:
        clock: returns seconds; the same for all versions that are to be compared.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._calls = Timeline(TIMES + BUCKETS)
        self._engine: dict[tuple[str, int], Timeline] = {}
        self._outputs: dict[tuple[str, str], _Output] = {}
        self._recent: deque[list[int]] = deque([[-1, 0]], maxlen=_RATE_WINDOWS)
        self._looks = 0
        self._looked_in = -1
        self._began_s = self._ended_s = self._awake_s = self._seen_s = clock()

    def on_call(self, outcome: Outcome, latency_s: float) -> None:
        """Counts a call that has ended.

        Args:
            outcome: how.
            latency_s: from its arrival to its end, in seconds.
        """
        now = self._clock()
        row = self._calls.row(now)
        if outcome is not Outcome.FAILED:  # a caller who leaves has waited at least so long
            row[TIMES + bucket_of(latency_s)] += 1
        if outcome is Outcome.CANCELLED:
            row[CANCELLED] += 1
            return
        row[CALLS] += 1
        if outcome is Outcome.FAILED:
            row[FAILED] += 1
        elif outcome is Outcome.CALLER_FAULT:
            row[CALLER_FAULTS] += 1
        self._ended_s = now
        window = int(now / WINDOW_S)
        if self._recent[-1][0] != window:
            self._recent.append([window, 0])
        self._recent[-1][1] += 1

    def on_batch(self, signature: str, rows: int, engine_time_us: int, outputs: Sequence[RawTensor]) -> None:
        """Counts a batch, and looks into its outputs unless it has looked into many just now.

        Args:
            signature: the signature that ran.
            rows: how many rows ran.
            engine_time_us: how long the engine took, in microseconds.
            outputs: all outputs, valid during the call.
        """
        self.on_time(signature, rows, engine_time_us)
        if self.take_look():
            self.on_categories(signature, {tensor.name: categories(tensor) for tensor in outputs})

    def on_time(self, signature: str, rows: int, engine_time_us: int) -> None:
        """Counts how long the engine took for a batch, in microseconds."""
        key = (signature, size_of(rows))
        times = self._engine.get(key)
        if times is None and len(self._engine) < _MAX_SIZES:
            times = self._engine[key] = Timeline(BUCKETS)
        if times is not None:
            times.row(self._clock())[bucket_of(engine_time_us / 1e6)] += 1

    def take_look(self) -> bool:
        """Returns whether the next batch's outputs are to be looked into, and counts it as one that is."""
        window = int(self._clock() / WINDOW_S)
        if window != self._looked_in:
            self._looks, self._looked_in = 0, window
        self._looks += 1
        return self._looks <= _LOOKS_PER_WINDOW

    def on_categories(self, signature: str, found: Mapping[str, Sequence[int]]) -> None:
        """Counts the categories of the rows of a batch's outputs."""
        now = self._clock()
        for name, labels in found.items():
            if not labels:
                continue
            output = self._outputs.get((signature, name))
            if output is None:
                if len(self._outputs) == _MAX_OUTPUTS:
                    continue
                output = self._outputs[signature, name] = _Output()
            output.add(labels, now)

    def snapshot(self, *, oldest_wait_s: float = 0.0) -> EvidenceSnapshot:
        """Returns what has been seen so far.

        Args:
            oldest_wait_s: how long the oldest call under way has been so, in seconds.
        """
        now = self._clock()
        if now - self._seen_s > _STALL_S:  # this process itself was stopped, and nothing could end
            self._awake_s = now
        self._seen_s = now
        return EvidenceSnapshot(
            calls=self._calls.counts(now),
            engine={key: timeline.counts(now) for key, timeline in self._engine.items()},
            outputs={key: output.counts(now) for key, output in self._outputs.items()},
            oldest_wait_s=max(0.0, min(oldest_wait_s, now - self._ended_s, now - self._awake_s)),
        )

    def traffic(self) -> Traffic:
        """Returns the figures that people look at."""
        now = self._clock()
        first = int(now / WINDOW_S) - _RATE_WINDOWS
        recent = sum(calls for window, calls in self._recent if window >= first)
        span_s = min(_RATE_WINDOWS * WINDOW_S, max(now - self._began_s, WINDOW_S))
        totals = self._calls.totals
        return Traffic(
            calls=totals[CALLS],
            errors=totals[FAILED] + totals[CALLER_FAULTS],
            calls_per_s=recent / span_s,
            p50_ms=quantile(totals[TIMES:], 0.5) * 1e3,
            p99_ms=quantile(totals[TIMES:], 0.99) * 1e3,
        )
