"""Evidence: what a version's calls and batches were like while a step of a rollout lasted.

It is written on the way of every call, so that it counts and does little else: times go into histograms
of logarithmic buckets, outputs into counts of categories, and of busy versions only some batches are
looked into.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from time import monotonic

import numpy as np

from modelport.tensors import array_from_bytes
from modelport_server.rollout.status import Traffic
from modelport_server.tensors import RawTensor

WINDOW_S = 0.25
"""Calls so close together are not independent of each other, and count for less."""
BUCKETS_PER_OCTAVE = 8
_LOOKS_PER_WINDOW = 32
_MAX_CLASSES = 10_000
_MAX_ROWS = 256
_RATE_WINDOWS = 20

NON_FINITE = "non-finite"
"""The category of rows with NaN or infinity."""


class Outcome(Enum):
    """How a call ended."""

    ANSWERED = "answered"
    FAILED = "failed"
    """The model or its engine failed, or the call expired before it ran."""
    CALLER_FAULT = "caller fault"
    """The model blamed the inputs."""
    CANCELLED = "cancelled"
    """The caller left."""


def bucket_of(seconds: float) -> int:
    """Returns the bucket of a time: the whole part of its logarithm of base 2 ** (1/8), in microseconds."""
    return int(math.log2(max(seconds * 1e6, 1.0)) * BUCKETS_PER_OCTAVE)


def seconds_of(bucket: int) -> float:
    """Returns the middle of a bucket, in seconds."""
    return float(2 ** ((bucket + 0.5) / BUCKETS_PER_OCTAVE) / 1e6)


@dataclass(slots=True)
class Tally:
    """How often each of some things was seen, and in how many windows of time."""

    counts: dict[int | str, float] = field(default_factory=dict[int | str, float])
    total: float = 0.0
    windows: int = 0
    _window: int = -1

    def add(self, what: int | str, window: int, weight: float = 1.0) -> None:
        """Counts one more."""
        self.counts[what] = self.counts.get(what, 0.0) + weight
        self.total += weight
        if window != self._window:
            self._window = window
            self.windows += 1

    def copy(self) -> Tally:
        """Returns one of its own."""
        return Tally(dict(self.counts), self.total, self.windows, self._window)

    def quantile(self, share: float) -> float:
        """Returns the time below which ``share`` of a histogram lies, in seconds; 0 without any."""
        left = share * self.total
        for bucket in sorted(bucket for bucket in self.counts if isinstance(bucket, int)):
            left -= self.counts[bucket]
            if left <= 0:
                return seconds_of(bucket)
        return 0.0

    def above(self, seconds: float) -> float:
        """Returns how much of a histogram lies above a time."""
        least = bucket_of(seconds)
        return sum(count for bucket, count in self.counts.items() if isinstance(bucket, int) and bucket > least)


@dataclass(frozen=True, slots=True)
class EvidenceSnapshot:
    """What had been seen at a moment."""

    calls: int
    """Calls that were answered or failed."""
    failed: int
    caller_faults: int
    windows: int
    """In how many windows of time there was a call."""
    latency: Tally
    """From a call's arrival to its end."""
    engine: Mapping[tuple[str, int], Tally]
    """The engine's time for a batch, by signature and the power of two of its rows."""
    outputs: Mapping[tuple[str, str], Tally]
    """What the outputs were like, by signature and output: predicted classes, or magnitudes."""
    oldest_wait_s: float = 0.0
    """How long the oldest call under way has been so."""


class Evidence:
    """Counts one servable's calls and batches.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._outcomes = dict.fromkeys(Outcome, 0)
        self._latency = Tally()
        self._engine: dict[tuple[str, int], Tally] = {}
        self._outputs: dict[tuple[str, str], Tally] = {}
        self._recent: deque[list[int]] = deque(maxlen=_RATE_WINDOWS)
        self._looks = 0
        self._looked_in = -1
        self._began_s = clock()

    def on_call(self, outcome: Outcome, latency_s: float) -> None:
        """Counts a call that has ended.

        Args:
            outcome: how.
            latency_s: from its arrival to its end, in seconds.
        """
        window = int(self._clock() / WINDOW_S)
        self._outcomes[outcome] += 1
        if outcome is not Outcome.FAILED:  # a caller who leaves has waited at least so long
            self._latency.add(bucket_of(latency_s), window)
        if not self._recent or self._recent[-1][0] != window:
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
        window = int(self._clock() / WINDOW_S)
        key = (signature, rows.bit_length())
        times = self._engine.get(key)
        if times is None:
            times = self._engine[key] = Tally()
        times.add(bucket_of(engine_time_us / 1e6), window)
        if window != self._looked_in:
            self._looks, self._looked_in = 0, window
        self._looks += 1
        if self._looks <= _LOOKS_PER_WINDOW:
            for tensor in outputs:
                self._look(signature, tensor, window)

    def _look(self, signature: str, tensor: RawTensor, window: int) -> None:
        found = categories(tensor)
        if not found:
            return
        key = (signature, tensor.name)
        tally = self._outputs.get(key)
        if tally is None:
            tally = self._outputs[key] = Tally()
        weight = 1.0 / len(found)  # rows of one batch are often of one caller, and alike
        for category in found:
            tally.add(category, window, weight)

    def snapshot(self, *, oldest_wait_s: float = 0.0) -> EvidenceSnapshot:
        """Returns what has been seen so far.

        Args:
            oldest_wait_s: how long the oldest call under way has been so, in seconds.
        """
        seen = self._outcomes
        return EvidenceSnapshot(
            calls=seen[Outcome.ANSWERED] + seen[Outcome.FAILED] + seen[Outcome.CALLER_FAULT],
            failed=seen[Outcome.FAILED],
            caller_faults=seen[Outcome.CALLER_FAULT],
            windows=self._latency.windows,
            latency=self._latency.copy(),
            engine={key: tally.copy() for key, tally in self._engine.items()},
            outputs={key: tally.copy() for key, tally in self._outputs.items()},
            oldest_wait_s=oldest_wait_s,
        )

    def traffic(self) -> Traffic:
        """Returns the figures that people look at."""
        now = self._clock()
        first = int(now / WINDOW_S) - _RATE_WINDOWS
        recent = sum(calls for window, calls in self._recent if window >= first)
        span_s = min(_RATE_WINDOWS * WINDOW_S, max(now - self._began_s, WINDOW_S))
        seen = self._outcomes
        return Traffic(
            calls=seen[Outcome.ANSWERED] + seen[Outcome.FAILED] + seen[Outcome.CALLER_FAULT],
            errors=seen[Outcome.FAILED] + seen[Outcome.CALLER_FAULT],
            calls_per_s=recent / span_s,
            p50_ms=self._latency.quantile(0.5) * 1e3,
            p99_ms=self._latency.quantile(0.99) * 1e3,
        )


def categories(tensor: RawTensor) -> list[int | str]:
    """Returns the category of each of the first rows of an output; nothing for one that has none.

    Scores (floats of rank 2 with at least two columns) have the column of the highest as their class,
    labels (whole numbers, one a row) themselves, other floats the power of two of a row's mean with its
    sign. Rows with NaN or infinity are a category of their own.
    """
    if tensor.dtype.is_string or not tensor.shape or not tensor.shape[0] or not tensor.elements:
        return []
    array = array_from_bytes(tensor.dtype, tensor.shape, tensor.data)[:_MAX_ROWS]
    if array.dtype.kind in "iub":
        labels = array.reshape(len(array), -1)
        return [int(label) for label in labels[:, 0]] if labels.shape[1] == 1 else []
    numbers = array.reshape(len(array), -1).astype(np.float32, copy=False)
    finite = np.asarray(np.isfinite(numbers).all(axis=1))
    if array.ndim == 2 and 2 <= array.shape[1] <= _MAX_CLASSES:
        found = numbers.argmax(axis=1)
    else:
        with np.errstate(all="ignore"):
            means = numbers.mean(axis=1)
            powers = np.clip(np.nan_to_num(np.log2(np.abs(means)), nan=-20, neginf=-20), -20, 20)
            found = (np.floor(powers) + 21) * np.sign(means)
    return [int(one) if good else NON_FINITE for one, good in zip(found.tolist(), finite.tolist(), strict=True)]
