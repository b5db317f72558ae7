"""What is written down of a version's calls and batches, and that it stays small."""

from __future__ import annotations

import math

import numpy as np
import pytest

from modelport.tensors import array_bytes, dtype_of
from modelport_server.outputs import NON_FINITE, categories
from modelport_server.rollout.evidence import (
    BATCHES,
    BROKEN,
    BUCKETS,
    CALLER_FAULTS,
    CALLS,
    FAILED,
    LABELS,
    OTHER,
    ROWS,
    Evidence,
    Outcome,
    bucket_of,
    quantile,
    seconds_of,
    size_of,
)
from modelport_server.rollout.timeline import MAX_WINDOWS, WINDOW_S, Timeline
from modelport_server.tensors import RawTensor

SIGNATURE = "serving_default"


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def evidence(clock: Clock) -> Evidence:
    return Evidence(clock)


def raw(array: object, name: str = "scores") -> RawTensor:
    numbers = np.asarray(array)
    dtype = dtype_of(numbers)
    return RawTensor(name, dtype, numbers.shape, array_bytes(numbers, dtype))


@pytest.mark.parametrize("seconds", [2e-6, 1e-4, 0.003, 0.1, 2.0, 50.0])
def test_a_time_is_known_within_a_tenth(seconds: float) -> None:
    assert seconds_of(bucket_of(seconds)) == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-9, 1e9])
def test_times_that_make_no_sense_are_counted_somewhere(seconds: float) -> None:
    assert 0 <= bucket_of(seconds) < BUCKETS


def test_batches_of_one_size_differ_by_less_than_a_half() -> None:
    sizes: dict[int, list[int]] = {}
    for rows in range(1, 2000):
        sizes.setdefault(size_of(rows), []).append(rows)
    assert all(max(rows) < 1.5 * min(rows) for rows in sizes.values())


def test_the_last_step_does_not_hide_what_came_before(evidence: Evidence) -> None:
    for _ in range(100):
        evidence.on_call(Outcome.ANSWERED, 0.010)
    seen = evidence.snapshot()
    more = seen.with_totals({"calls": 5000, "failed": 20})
    assert (more.ended, more.totals()) == (5000, {"calls": 5000, "failed": 20, "caller_faults": 0})
    assert more.times.tolist() == seen.times.tolist()
    assert seen.with_totals({"calls": 50, "failed": 20}) is seen
    assert seen.with_totals({}) is seen
    assert seen.ended == 100


def test_every_outcome_is_counted_as_what_it_is(evidence: Evidence, clock: Clock) -> None:
    for outcome, count in zip(Outcome, (50, 4, 3, 2), strict=True):
        for _ in range(count):
            evidence.on_call(outcome, 0.010)
    seen = evidence.snapshot()
    assert seen.ended == 57
    assert (seen.calls.totals[FAILED], seen.calls.totals[CALLER_FAULTS]) == (4, 3)
    assert seen.times.sum() == 55  # of those that were cancelled it is known how long they waited
    traffic = evidence.traffic()
    assert (traffic.calls, traffic.errors) == (57, 7)
    assert traffic.p50_ms == pytest.approx(10, rel=0.1)
    assert traffic.p99_ms == pytest.approx(10, rel=0.1)


def test_the_rate_is_that_of_the_last_seconds(evidence: Evidence, clock: Clock) -> None:
    for _ in range(1000):
        evidence.on_call(Outcome.ANSWERED, 0.001)
        clock.now_s += 0.01
    assert evidence.traffic().calls_per_s == pytest.approx(100, rel=0.1)
    clock.now_s += 60
    assert evidence.traffic().calls_per_s == 0


def test_nothing_at_all_is_something_to_look_at(evidence: Evidence) -> None:
    assert evidence.snapshot().ended == 0
    assert evidence.traffic().p99_ms == 0


def test_a_snapshot_stays_as_it_is(evidence: Evidence, clock: Clock) -> None:
    evidence.on_call(Outcome.ANSWERED, 0.001)
    clock.now_s += 1
    before = evidence.snapshot()
    evidence.on_call(Outcome.ANSWERED, 0.001)
    clock.now_s += 1
    evidence.snapshot()
    assert before.ended == 1
    assert before.calls.counts[:, CALLS].tolist() == [1]


def test_windows_are_those_of_the_clock(evidence: Evidence, clock: Clock) -> None:
    for at_s in (1000.0, 1000.24, 1000.25, 1007.0):
        clock.now_s = at_s
        evidence.on_call(Outcome.ANSWERED, 0.001)
    clock.now_s = 1008.0
    calls = evidence.snapshot().calls
    assert calls.windows.tolist() == [4000, 4001, 4028]
    assert calls.counts[:, CALLS].tolist() == [2, 1, 1]


def test_a_window_that_is_not_over_is_counted_in_the_totals_only(evidence: Evidence) -> None:
    evidence.on_call(Outcome.ANSWERED, 0.001)
    calls = evidence.snapshot().calls
    assert len(calls.windows) == 0
    assert calls.totals[CALLS] == 1


def test_a_timeline_of_a_day_is_no_larger_than_that_of_minutes() -> None:
    timeline = Timeline(1)
    rng = np.random.default_rng(1)
    now_s, count = 1000.1, 5000
    for _ in range(count):
        timeline.row(now_s)[0] += 1
        now_s += rng.exponential(17.0)
    counts = timeline.counts(now_s)
    assert len(counts.windows) <= MAX_WINDOWS
    assert counts.totals.tolist() == [count]
    assert timeline.totals == [count]
    assert counts.counts.sum() == count
    assert np.all(np.diff(counts.windows) > 0)
    assert counts.level >= 8
    length_s = WINDOW_S * 2**counts.level
    assert counts.windows[0] == int(1000.1 / length_s)
    assert counts.windows[-1] <= int(now_s / length_s)


def test_longer_windows_hold_the_same() -> None:
    timeline = Timeline(2)
    for window in range(100):
        row = timeline.row(window * WINDOW_S)
        row[0] += 1
        row[1] += window
    counts = timeline.counts(1e6)
    longer = counts.at(3)
    assert longer.windows.tolist() == list(range(13))
    assert longer.counts[:, 0].tolist() == [8] * 12 + [4]
    assert longer.counts[1].tolist() == [8, sum(range(8, 16))]
    assert counts.at(0) is counts


def test_quantiles_are_those_of_the_times() -> None:
    times = np.random.default_rng(2).lognormal(-5, 1, 20_000)
    histogram = np.bincount([bucket_of(seconds) for seconds in times], minlength=BUCKETS)
    for share in (0.01, 0.5, 0.99):
        assert quantile(histogram, share) == pytest.approx(float(np.quantile(times, share)), rel=0.1)


def test_scores_have_their_highest_column_as_category() -> None:
    assert categories(raw(np.eye(5, dtype=np.float32)[[3, 0, 4]])) == [3, 0, 4]


def test_rows_with_nan_or_infinity_are_a_category() -> None:
    scores = np.eye(3, dtype=np.float32)
    scores[0, 1], scores[2, 0] = math.nan, -math.inf
    assert categories(raw(scores)) == [NON_FINITE, 1, NON_FINITE]
    assert categories(raw(np.array([[math.inf], [1.0]], np.float64)))[0] == NON_FINITE


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
def test_labels_are_their_own_category(dtype: str) -> None:
    assert categories(raw(np.array([1, 0, 1]).astype(dtype))) == [1, 0, 1]
    assert categories(raw(np.array([[1], [0]]).astype(dtype))) == [1, 0]


def test_other_numbers_are_told_apart_by_their_size() -> None:
    found = categories(raw(np.array([[-8.0], [-1.0], [0.0], [0.1], [0.3], [0.31], [0.9]], np.float32)))
    assert found == sorted(found)
    assert len(set(found)) == 6
    assert categories(raw(np.ones((2, 4, 4, 3), np.float16))) == categories(raw(np.ones(2, np.float32)))


@pytest.mark.parametrize(
    "nothing",
    [
        np.array([b"one", b"two"], dtype=object),
        np.zeros((0, 10), np.float32),
        np.zeros((4, 0), np.float32),
        np.float32(3.0),
        np.zeros((2, 7), np.int64),
    ],
)
def test_some_outputs_have_no_categories(nothing: object) -> None:
    assert categories(raw(nothing)) == []


def test_a_large_output_is_looked_at_in_its_first_rows() -> None:
    assert len(categories(raw(np.zeros((5000, 2), np.float32)))) == 256
    assert len(categories(raw(np.zeros((64, 100, 100), np.float32)))) == 6
    assert len(categories(raw(np.zeros((2, 1000, 1000), np.float32)))) == 1


def test_outputs_are_counted_by_row_and_batch(evidence: Evidence, clock: Clock) -> None:
    scores = np.eye(4, dtype=np.float32)[[2, 2, 1, 0]]
    scores[3] = math.nan
    for _ in range(3):
        evidence.on_batch(SIGNATURE, 4, 1500, [raw(scores)])
    seen = evidence.snapshot()
    output = seen.outputs[SIGNATURE, "scores"]
    totals = output.counts.totals
    assert (totals[BATCHES], totals[ROWS], totals[BROKEN], totals[OTHER]) == (3, 12, 3, 0)
    assert dict(zip(output.labels, totals[LABELS:].tolist(), strict=False)) == {2: 6, 1: 3}
    (times,) = seen.engine.values()
    assert quantile(times.totals, 0.5) == pytest.approx(0.0015, rel=0.1)


def test_more_categories_than_there_is_room_for_are_counted_together(evidence: Evidence, clock: Clock) -> None:
    for label in range(200):
        evidence.on_batch(SIGNATURE, 1, 100, [raw(np.array([label]), "label")])
        clock.now_s += WINDOW_S  # so many batches are looked into at a time, and no more
    output = evidence.snapshot().outputs[SIGNATURE, "label"]
    totals = output.counts.totals
    assert output.full
    assert totals[ROWS] == 200
    assert totals[OTHER] == 200 - len(output.labels) > 0


def test_so_many_batches_are_looked_into_at_a_time(evidence: Evidence) -> None:
    for _ in range(200):
        evidence.on_batch(SIGNATURE, 1, 100, [raw(np.array([1]), "label")])
    assert evidence.snapshot().outputs[SIGNATURE, "label"].counts.totals[ROWS] == 32


def test_memory_is_bounded_whatever_comes(evidence: Evidence, clock: Clock) -> None:
    for number in range(3000):
        rows = 1 + number * 37 % 5000
        outputs = [raw(np.array([number]), f"label{number % 40}")]
        evidence.on_batch(f"signature{number % 50}", rows, 100 + number, outputs)
        clock.now_s += 0.1
    seen = evidence.snapshot()
    assert len(seen.engine) == 32
    assert len(seen.outputs) == 16
    assert all(len(output.labels) <= 64 for output in seen.outputs.values())


def test_a_label_beyond_the_room_makes_an_output_full(evidence: Evidence, clock: Clock) -> None:
    for label in range(100):
        evidence.on_batch(SIGNATURE, 1, 100, [raw(np.array([label]), "label")])
        clock.now_s += 0.1
    output = evidence.snapshot().outputs[SIGNATURE, "label"]
    assert output.full
    assert len(output.labels) == 64
    assert output.counts.totals[OTHER] == 36


def test_a_call_waits_only_while_no_other_ends(evidence: Evidence, clock: Clock) -> None:
    for _ in range(40):
        evidence.snapshot()
        clock.now_s += 0.2
    assert evidence.snapshot(oldest_wait_s=6.0).oldest_wait_s == 6.0
    evidence.on_call(Outcome.ANSWERED, 0.1)
    clock.now_s += 0.2
    assert evidence.snapshot(oldest_wait_s=6.2).oldest_wait_s == pytest.approx(0.2)


def test_time_in_which_this_process_was_stopped_is_not_waited(evidence: Evidence, clock: Clock) -> None:
    evidence.snapshot()
    clock.now_s += 10
    assert evidence.snapshot(oldest_wait_s=10.0).oldest_wait_s == 0
