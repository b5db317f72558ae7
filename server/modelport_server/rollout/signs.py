"""The signs by which a candidate is seen to be worse than the stable version, each with what speaks for it.

A sign is real if what was seen is beyond the limits, in the median or on average, since it began; how sure
it is says its ``log_e``. Both together make a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from modelport_registry import JSON
from modelport_server.rollout.drift import shift_drift, time_drift
from modelport_server.rollout.evidence import (
    BATCHES,
    BROKEN,
    BUCKETS,
    BUCKETS_PER_OCTAVE,
    CALLER_FAULTS,
    CALLS,
    CANCELLED,
    FAILED,
    LABELS,
    OTHER,
    ROWS,
    TIMES,
    EvidenceSnapshot,
    OutputCounts,
    quantile,
    seconds_of,
)
from modelport_server.rollout.sequential import ODDS, Floats, Shares, paired, since, single, upper_limit
from modelport_server.rollout.timeline import WINDOW_S, Counts, Whole, joined
from modelport_server.rollout.times import TIME_UNITS, FirstTimes, Times, mean_of

_UNITS = 4.0
"""How many independent ones whatever happens in one window counts for at most."""
_LONE_UNITS = 10.0
_LONE_TIME_UNITS = 0.5
_LONE_SLACK = 1.25
"""How much slower the whole machine may have become since the stable version was measured."""
_LONE_SHIFT = 0.3
_PROOF = 0.05
"""The part of the errors that are allowed which has to be exceeded for sure."""
_SURE_OF_SIZE = math.log(3)
_QUANTILES = (0.3, 0.55, 0.8)
_TIME_FLOOR_S = 0.0005
"""A difference that nobody notices."""
_IDLE_S = 0.005
"""An engine that is idle for so long between batches finds its caches cold."""
_MORE_OFTEN = 1.5
"""Another one that has so many times as many calls finds them warm oftener."""
_COLD_RATIO = 2.5
"""How many times as long a cold engine takes at most."""
_COLD_S = 0.004
"""And how much longer: by then the caches are filled again."""
_LEAST_SHARE = 0.1
"""Batches of a size that fewer of the candidate's have are not waited for."""
_MAX_NON_FINITE = 0.002
LEAST_STABLE = 30
"""Fewer calls or batches of the stable version say nothing about what is usual."""
_LEAST_BAD_WINDOWS = 2
_LEAST_TIME_WINDOWS = 6
_LEAST_LONE_TIME_WINDOWS = 12
_LEAST_OUTPUT_WINDOWS = 4
_LATELY = 8
_GROUP = 128
_SECONDS = np.array([seconds_of(bucket) for bucket in range(BUCKETS)])
_MAX_LEVEL = 5


@dataclass(frozen=True, slots=True)
class Sign:
    """Something that may be worse."""

    name: str
    log_e: float = 0.0
    """The logarithm of the stake that bets against its being as good have come to."""
    real: bool = False
    """Whether the best estimate is beyond the limits."""
    reason: str = ""
    figures: Mapping[str, JSON] = field(default_factory=dict[str, JSON])


def _floats(counts: NDArray[np.int32]) -> Floats:
    return counts.astype(np.float64)


@dataclass(frozen=True, slots=True)
class View:
    """Both versions' evidence and how it is compared."""

    stable: EvidenceSnapshot
    candidate: EvidenceSnapshot
    paired: bool
    """Whether both were at work at the same time."""
    level: int
    """How long the windows are in which they are compared."""

    colder: bool = False
    """Whether the candidate's engine is idle between batches, and more so than the stable version's."""

    @property
    def length_s(self) -> float:
        """How long a window is, in seconds."""
        return WINDOW_S * 2.0**self.level

    def pair(self, stable: Counts, candidate: Counts, columns: slice) -> tuple[Whole, Floats, Floats]:
        """Returns the windows in which both did something, and each one's counts."""
        before, now = stable.at(self.level), candidate.at(self.level)
        windows, left, right = np.intersect1d(before.windows, now.windows, assume_unique=True, return_indices=True)
        return windows, _floats(before.counts[left, columns]), _floats(now.counts[right, columns])

    def times(self, stable: Counts, candidate: Counts, first: int = 0) -> Times:
        """Returns the histograms of times that begin in column ``first``."""
        used = np.flatnonzero(stable.totals[first:] + candidate.totals[first:])
        low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        return Times(_SECONDS[low:high], *self.pair(stable, candidate, slice(first + low, first + high)))

    def ago(self, window: int) -> str:
        """Returns since when something has been so, for people."""
        last = self.candidate.calls.at(self.level).windows
        seconds = (int(last[-1]) - window + 1) * self.length_s if len(last) else self.length_s
        return f"in the last {seconds:.3g} s"


def view(stable: EvidenceSnapshot, candidate: EvidenceSnapshot, *, concurrent: bool) -> View:
    """Returns how to compare two versions: in windows that are as short as the traffic allows."""
    counts = (stable, candidate)
    level = max(
        0,
        *(one.calls.level for one in counts),
        *(counts.level for one in counts for counts in one.engine.values()),
        *(output.counts.level for one in counts for output in one.outputs.values()),
    )
    together = concurrent or _end_s(stable.calls) > _begin_s(candidate.calls) + 1.0
    found = View(stable, candidate, together, level, _colder(stable, candidate))
    while together and found.level < _MAX_LEVEL and _sparse(found):
        found = replace(found, level=found.level + 1)
    return found


def _colder(stable: EvidenceSnapshot, candidate: EvidenceSnapshot) -> bool:
    return _idle_s(candidate) > _IDLE_S and _calls_per_s(stable) > _MORE_OFTEN * _calls_per_s(candidate)


def _calls_per_s(seen: EvidenceSnapshot) -> float:
    """Returns how many calls there were in a second, of those in which any ended."""
    return float(seen.calls.counts[:, CALLS].sum()) / _busy_s(seen) if len(seen.calls.windows) else 0.0


def _idle_s(seen: EvidenceSnapshot) -> float:
    """Returns how long the engine was idle between two batches on average, while calls came."""
    histogram = np.sum([counts.totals for counts in seen.engine.values()], axis=0) if seen.engine else np.zeros(0)
    batches = float(histogram.sum())
    return (_busy_s(seen) - float(histogram @ _SECONDS)) / batches if batches else 0.0


def _busy_s(seen: EvidenceSnapshot) -> float:
    return len(seen.calls.windows) * WINDOW_S * 2.0**seen.calls.level


def _begin_s(counts: Counts) -> float:
    return float(counts.windows[0]) * WINDOW_S * 2.0**counts.level if len(counts.windows) else math.inf


def _end_s(counts: Counts) -> float:
    return float(counts.windows[-1] + 1) * WINDOW_S * 2.0**counts.level if len(counts.windows) else -math.inf


def _sparse(one: View) -> bool:
    """Returns whether the windows hold too few calls to compare those within each. Their outcome has no part in it."""
    now, before = one.candidate.calls.at(one.level), one.stable.calls.at(one.level)
    common = np.isin(before.windows, now.windows, assume_unique=True)
    windows, columns = max(len(now.windows), 1), [CALLS, CANCELLED]
    calls = now.counts[:, columns].sum() / windows
    return bool(calls < _UNITS and calls + before.counts[common][:, columns].sum() / windows < _GROUP)


@dataclass(frozen=True, slots=True)
class _Rise:
    log_e: float
    real: bool
    first: int
    hits: int
    of: int
    stable_share: float


def _rise_together(shares: Shares, margin: float, units: Floats) -> _Rise:
    """Returns what speaks for a share's being larger than the stable version's at the same time."""
    proof = since(paired(shares, _PROOF * margin, units))
    size = since(paired(shares, margin, units))
    bad, of = shares.hits[proof.first :], shares.of[proof.first :]
    there = float(shares.stable_hits[proof.first :].sum() / max(shares.stable_of[proof.first :].sum(), 1))
    return _risen(proof.log_e, proof.first, bad, of, there, margin, sure=size.log_e >= _SURE_OF_SIZE)


def _rise_alone(hits: Floats, of: Floats, before: tuple[int, int], margin: float, units: Floats) -> _Rise:
    """Returns what speaks for a share's being larger than the stable version's was earlier."""
    limit = upper_limit(*before, 1e-6) + margin
    if limit >= 1:
        return _Rise(0.0, False, 0, 0, 0, 0.0)
    # Whatever goes wrong in one window counts as one: it may have one cause, and nothing tells whose.
    capped = np.minimum(hits, np.maximum(of / units, 1.0))
    found = since(single(capped, of, limit, units))
    there = before[0] / max(before[1], 1)
    return _risen(found.log_e, found.first, hits[found.first :], of[found.first :], there, limit - there, sure=True)


def _risen(log_e: float, first: int, hits: Floats, of: Floats, there: float, margin: float, *, sure: bool) -> _Rise:
    real = sure and hits.sum() / max(of.sum(), 1) > there + margin and (hits > 0).sum() >= _LEAST_BAD_WINDOWS
    return _Rise(log_e, bool(real), first, int(hits.sum()), int(of.sum()), there)


def errors(one: View, margin: float, *, caller_faults: bool) -> Sign:
    """Returns whether more calls fail."""
    columns = [FAILED, CALLER_FAULTS] if caller_faults else [FAILED]
    if one.paired:
        windows, before, now = one.pair(one.stable.calls, one.candidate.calls, slice(TIMES))
        shares = Shares(now[:, columns].sum(axis=1), now[:, CALLS], before[:, columns].sum(axis=1), before[:, CALLS])
        rise = _rise_together(shares, margin, np.full(len(windows), _UNITS))
    else:
        counts, totals = one.candidate.calls.at(one.level), one.stable.calls.totals
        windows, now = counts.windows, _floats(counts.counts[:, :TIMES])
        earlier = (int(totals[columns].sum()), int(totals[CALLS]))
        units = np.minimum(np.maximum(now[:, CALLS], 1), _LONE_UNITS)
        rise = _rise_alone(now[:, columns].sum(axis=1), now[:, CALLS], earlier, margin, units)
    if not rise.of:
        return Sign("errors")
    reason = (
        f"{rise.hits} of {rise.of} calls failed {one.ago(int(windows[rise.first]))}, "
        f"{rise.stable_share:.2%} of the stable version's"
    )
    figures: dict[str, JSON] = {
        "failed": rise.hits,
        "of": rise.of,
        "stable_share": round(rise.stable_share, 6),
    }
    return Sign("errors", rise.log_e, rise.real, reason, figures)


def latency(one: View, ratio: float) -> Sign:
    """Returns whether calls take longer than those of the same moments."""
    times = one.times(one.stable.calls, one.candidate.calls, TIMES)
    return _slower(one, "latency", "calls take", [times], ratio)


def engine_time(one: View, ratio: float) -> Sign:
    """Returns whether batches take longer than those of about the same size, or than larger ones."""
    if not one.paired:
        return _slower_alone(one, sorted(one.candidate.engine.keys() & one.stable.engine.keys()), ratio)
    same, larger = _batch_times(one)
    what = "batches that are no larger take" if larger else "batches of the same size take"
    return _slower(one, "engine", what, same + larger, ratio)


def _batch_times(one: View) -> tuple[list[Times], list[Times]]:
    """Returns the times of the candidate's batches beside those of the same size, and of others beside larger ones."""
    same = {key for key in one.candidate.engine if _has_often(one, key)}
    return [one.times(one.stable.engine[key], one.candidate.engine[key]) for key in sorted(same)], _beside_larger(
        one, same
    )


def _has_often(one: View, key: tuple[str, int]) -> bool:
    """Returns whether the stable version mostly has batches of a size when the candidate has."""
    stable, windows = one.stable.engine.get(key), one.candidate.engine[key].at(one.level).windows
    return stable is not None and 2 * int(np.isin(windows, stable.at(one.level).windows).sum()) >= len(windows)


def _beside_larger(one: View, same: Collection[tuple[str, int]]) -> list[Times]:
    """Returns the times of the candidate's batches of other sizes, each beside those that are as large or larger.

    Where calls come in large batches the stable version seldom has small ones, and larger ones take no less
    time. No batch counts twice: each of the stable version's is compared with the largest that is no larger.
    """
    found: list[Times] = []
    below: dict[str, int] = {}
    for signature, size in sorted(one.candidate.engine.keys() - same, reverse=True):
        theirs = [
            counts
            for key, counts in one.stable.engine.items()
            if key not in same and key[0] == signature and size <= key[1] < below.get(signature, key[1] + 1)
        ]
        if theirs:
            below[signature] = size
            found.append(one.times(joined(theirs), one.candidate.engine[signature, size]))
    return found


def _slower(one: View, name: str, what: str, pairs: Sequence[Times], ratio: float) -> Sign:
    """Returns whether times are longer than the stable version's, or, for having few calls, than they were at first."""
    pairs = [times for times in pairs if times.stable.sum() >= LEAST_STABLE and times.candidate.sum()]
    if not pairs:
        return Sign(name)
    if not one.colder:
        return _slower_than_stable(one, name, what, pairs, ratio, 1.0)
    both = (
        _slower_than_stable(one, name, what, pairs, ratio, _COLD_RATIO),
        _slower_than_at_first(one, name, what, pairs, ratio),
    )
    sign = max(both, key=lambda sign: (sign.real, sign.log_e))
    return replace(sign, log_e=sign.log_e - math.log(len(both)))


def _slower_than_stable(
    one: View, name: str, what: str, pairs: Sequence[Times], ratio: float, cold_ratio: float
) -> Sign:
    windows = np.unique(np.concatenate([times.windows for times in pairs]))
    proof, size = (since(bets) for bets in _time_bets(windows, pairs, ratio, cold_ratio))
    first = int(windows[proof.first])
    tails = [times.since(first) for times in pairs]
    slow, of = (sum(counts) for counts in zip(*(_beyond(times, ratio, cold_ratio) for times in tails), strict=True))
    enough = len(windows) - proof.first >= _LEAST_TIME_WINDOWS
    real = enough and size.log_e >= _SURE_OF_SIZE and slow > of / 2
    most = max(tails, key=lambda times: float(times.candidate.sum()))
    medians = (_median(most.seconds, most.stable), _median(most.seconds, most.candidate))
    explained = _explained(cold_ratio, medians[0])
    return _slow_sign(name, what, proof.log_e, real, medians, f"of {of:.0f} {one.ago(first)}", explained)


def _slower_than_at_first(one: View, name: str, what: str, pairs: Sequence[Times], ratio: float) -> Sign:
    """Returns whether times have become longer than the candidate's first, both beside the stable version's.

    The gates have measured the candidate beside the stable version when both were warm. So what its first batches
    take more is put down to its having been idle, as far as that can be the reason. The test is Student's,
    of the logarithms: what it says is the likelihood ratio, divided among the windows that it may have begun in.
    """
    known = [first for first in (FirstTimes.of(times, one.length_s) for times in pairs) if first.known]
    if not known:
        return Sign(name)
    windows = np.unique(np.concatenate([first.windows for first in known]))
    most = max(known, key=lambda first: float(first.times.candidate.sum()))
    found: list[Sign] = []
    for begin in _begins(windows):
        enough = int((windows >= begin).sum()) >= _LEAST_TIME_WINDOWS
        sign = _changed(one, name, what, begin, known, most, ratio, enough=enough)
        # Half of the stake is on the first window, as in ``since``.
        stakes = 2.0 if begin == windows[0] else 2.0 * len(windows)
        found.append(replace(sign, log_e=sign.log_e - math.log(stakes)))
    return max(found, key=lambda sign: (sign.real, sign.log_e))


def _changed(
    one: View,
    name: str,
    what: str,
    begin: int,
    known: Sequence[FirstTimes],
    most: FirstTimes,
    ratio: float,
    *,
    enough: bool,
) -> Sign:
    """Returns whether times have become longer from window ``begin`` on.

    Args:
        one: the evidence.
        name: the sign's.
        what: what takes long, for people.
        begin: a window.
        known: the times, by batch size.
        most: those of the size that there is most of.
        ratio: how many times as long they may take.
        enough: whether that is long enough ago.
    """
    change = mean_of([change for change in (first.change(begin) for first in known) if change is not None])
    tail = most.times.since(begin)
    before, now = _median(most.times.seconds, most.times.stable), _median(tail.seconds, tail.candidate)
    at_first, later = math.exp(change.usual), math.exp(change.usual + change.difference)
    # To fill caches takes no longer in a model that computes longer: it is added, not multiplied.
    limit = _limit(before, ratio) / before + max(at_first - 1, 0.0)
    reason = (
        f"{what} {later:.3g} times as long as the stable version's {one.ago(begin)}, and took {at_first:.3g} times "
        f"as long at first: {now * 1e3:.3g} ms in the median now, the stable version's {before * 1e3:.3g} ms"
    )
    figures: dict[str, JSON] = {
        "stable_p50_ms": round(before * 1e3, 3),
        "candidate_p50_ms": round(now * 1e3, 3),
        "first_ratio": round(at_first, 3),
        "now_ratio": round(later, 3),
    }
    return Sign(name, change.log_likelihood_ratio, enough and later > limit, reason, figures)


def _begins(windows: Whole) -> list[int]:
    """Returns the windows from which on it may have changed: all, the latter half, the last quarter and so on."""
    found = [int(windows[0])]
    length = len(windows) // 2
    while length >= _LEAST_TIME_WINDOWS:
        found.append(int(windows[-length]))
        length //= 2
    return found


def first_ratio(one: View) -> float | None:
    """Returns how many times as long a candidate's first calls took, 1 where that does not matter; None until known."""
    if not (one.paired and one.colder):
        return 1.0
    calls = FirstTimes.of(one.times(one.stable.calls, one.candidate.calls, TIMES), one.length_s)
    if not calls.known:
        return None
    same, larger = _batch_times(one)
    batches = [times for times in same + larger if times.stable.sum() >= LEAST_STABLE]
    least = _LEAST_SHARE * sum(float(counts.totals.sum()) for counts in one.candidate.engine.values())
    batches = [times for times in batches if times.candidate.sum() >= max(least, 1.0)]
    known = not batches or any(FirstTimes.of(times, one.length_s).known for times in batches)
    return calls.usual if known else None


def _explained(ratio: float, seconds: float) -> float:
    """Returns how many times as long something may take for being cold, of what it takes beside ``seconds``."""
    return min(ratio, _COLD_RATIO, 1.0 + _COLD_S / max(seconds, 1e-9))


def _median(seconds: Floats, counts: Floats) -> float:
    below = counts.sum(axis=0).cumsum()
    return float(seconds[np.searchsorted(below, below[-1] / 2)]) if below[-1] else 0.0


def _beyond(times: Times, ratio: float, cold_ratio: float) -> tuple[float, float]:
    """Returns how many of the candidate's times are beyond the limits, and of how many."""
    limit_s = _limit(_median(times.seconds, times.stable), ratio)
    counts = times.candidate.sum(axis=0)
    return float(counts[_warm(times, cold_ratio) > limit_s].sum()), float(counts.sum())


def _warm(times: Times, cold_ratio: float) -> Floats:
    """Returns the times, each without the part of it that is put down to a cold engine."""
    return times.seconds / _explained(cold_ratio, _median(times.seconds, times.stable))


def _slow_sign(
    name: str, what: str, log_e: float, real: bool, medians: Sequence[float], of: str, cold_ratio: float
) -> Sign:
    before, now = (seconds * 1e3 for seconds in medians)
    reason = f"{what} {now:.3g} ms in the median {of}, the stable version's {before:.3g} ms"
    figures: dict[str, JSON] = {"stable_p50_ms": round(before, 3), "candidate_p50_ms": round(now, 3)}
    if cold_ratio > 1:
        cold_ms = before * (cold_ratio - 1)
        reason += f" ({cold_ms:.2g} ms are put down to its having few calls)"
        figures["cold_ratio"] = round(cold_ratio, 3)
    return Sign(name, log_e, real, reason, figures)


def _limit(seconds: float, ratio: float) -> float:
    return max(ratio * seconds, seconds + _TIME_FLOOR_S)


def _time_bets(windows: Whole, pairs: Sequence[Times], ratio: float, cold_ratio: float) -> tuple[Floats, Floats]:
    """Returns the bets, by window, that times are no longer at all, and that they are within the limits."""
    rows = len(_QUANTILES) * len(ODDS)
    proof, size = np.zeros((rows, len(windows))), np.zeros((rows, len(windows)))
    for times in pairs:
        place = np.searchsorted(windows, times.windows)
        below = (times.stable.cumsum(axis=1), times.candidate.cumsum(axis=1))
        warm = _warm(times, cold_ratio)
        proof[:, place] += _order_bets(*below, _shifted(times.seconds, warm, math.sqrt(ratio), _TIME_FLOOR_S / 2))
        size[:, place] += _order_bets(*below, _shifted(times.seconds, warm, ratio, _TIME_FLOOR_S))
    return proof, size


def _shifted(seconds: Floats, warm: Floats, ratio: float, floor_s: float) -> NDArray[np.intp]:
    """Returns up to which column times lie that are no longer than each column's once they are shortened.

    Args:
        seconds: the times of the columns.
        warm: the same, less what is put down to a cold engine.
        ratio: they are shortened to one part in so many.
        floor_s: they are shortened by so many seconds at least.
    """
    shorter = np.maximum(np.minimum(warm / ratio, warm - floor_s), seconds[0])
    buckets = (np.log2(shorter / seconds[0]) * BUCKETS_PER_OCTAVE + 0.5).astype(np.int64)
    return np.searchsorted(buckets, np.arange(len(seconds)), side="right") - 1


def _order_bets(before: Floats, now: Floats, last: NDArray[np.intp]) -> Floats:
    """Returns bets that shortened times are no longer than the stable version's.

    A hit is a time above a quantile of all times of its window, so that only their order matters.
    """
    now = now[:, last]
    both, rows = before + now, np.arange(len(before))
    units = np.full(len(before), TIME_UNITS)
    bets: list[Floats] = []
    for share in _QUANTILES:
        cut = (both >= share * both[:, -1:]).argmax(axis=1)
        shares = Shares(now[:, -1] - now[rows, cut], now[:, -1], before[:, -1] - before[rows, cut], before[:, -1])
        bets.append(paired(shares, 0.0, units))
    return np.concatenate(bets)


def _slower_alone(one: View, keys: Sequence[tuple[str, int]], ratio: float) -> Sign:
    """Returns whether more than half of the batches take longer than the stable version's did earlier."""
    hits: dict[int, float] = {}
    of: dict[int, float] = {}
    most, medians, cold_ratio = 0, (0.0, 0.0), 1.0
    for key in keys:
        totals = one.stable.engine[key].totals
        if totals.sum() < LEAST_STABLE:
            continue
        before = quantile(totals, 0.5)
        counts = one.candidate.engine[key].at(one.level)
        cold = _explained(_COLD_RATIO, before) if one.colder else 1.0
        limit_s = _limit(before, ratio * _LONE_SLACK * time_drift(one.stable.engine[key]))
        over = counts.counts[:, limit_s < _SECONDS / cold].sum(axis=1).tolist()
        for window, slow, all_of in zip(counts.windows.tolist(), over, counts.counts.sum(axis=1).tolist(), strict=True):
            hits[window] = hits.get(window, 0.0) + slow
            of[window] = of.get(window, 0.0) + all_of
        if (total := int(one.candidate.engine[key].totals.sum())) > most:
            most, medians, cold_ratio = total, (before, quantile(one.candidate.engine[key].totals, 0.5)), cold
    if not of:
        return Sign("engine")
    windows = sorted(of)
    slow = np.array([hits[window] for window in windows])
    batches = np.array([of[window] for window in windows])
    found = since(single(slow, batches, 0.5, np.full(len(windows), _LONE_TIME_UNITS)))
    enough = len(windows) - found.first >= _LEAST_LONE_TIME_WINDOWS
    real = bool(enough and slow[found.first :].sum() > batches[found.first :].sum() / 2)
    what = "batches of the same size take"
    of_them = f"of {batches[found.first :].sum():.0f} {one.ago(windows[found.first])}"
    return _slow_sign("engine", what, found.log_e, real, medians, of_them, cold_ratio)


def outputs(one: View, max_shift: float) -> list[Sign]:
    """Returns whether each output has more rows with NaN or infinity, and whether its categories have shifted."""
    found: list[Sign] = []
    for key, now in sorted(one.candidate.outputs.items()):
        before = one.stable.outputs.get(key)
        if before is not None and before.counts.totals[BATCHES] >= LEAST_STABLE:
            found += [_non_finite(one, key[1], before, now), _shift(one, key[1], before, now, max_shift)]
    # Each of many outputs has to speak more clearly than a single one.
    return [replace(sign, log_e=sign.log_e - math.log(len(found) / 2)) for sign in found]


def _non_finite(one: View, name: str, before: OutputCounts, now: OutputCounts) -> Sign:
    if one.paired:
        windows, left, right = one.pair(before.counts, now.counts, slice(None))
        units = np.minimum(right[:, BATCHES], _UNITS)
        shares = Shares(right[:, BROKEN], right[:, ROWS], left[:, BROKEN], left[:, ROWS])
        rise = _rise_together(shares, _MAX_NON_FINITE, units)
    else:
        counts, totals = now.counts.at(one.level), before.counts.totals
        windows, right = counts.windows, counts.counts.astype(np.float64)
        earlier = (int(totals[BROKEN]), int(totals[ROWS]))
        units = np.minimum(right[:, BATCHES], _LONE_UNITS)
        rise = _rise_alone(right[:, BROKEN], right[:, ROWS], earlier, _MAX_NON_FINITE, units)
    if not rise.of:
        return Sign("non-finite")
    reason = (
        f"output {name!r} has NaN or infinity in {rise.hits} of {rise.of} rows {one.ago(int(windows[rise.first]))}, "
        f"the stable version's in {rise.stable_share:.2%}"
    )
    figures: dict[str, JSON] = {"output": name, "non_finite": rise.hits, "of": rise.of}
    return Sign("non-finite", rise.log_e, rise.real, reason, figures)


def _shift(one: View, name: str, before: OutputCounts, now: OutputCounts, max_shift: float) -> Sign:
    if len(before.labels) == len(now.labels) == 1 and not (before.full or now.full):
        return Sign("outputs")  # each always says the same, as an output does that names its version
    labels, old, new = _aligned(before, now)
    if one.paired:
        windows, left, right = one.pair(before.counts, now.counts, slice(None))
        batches, stable, candidate = right[:, BATCHES], left @ old, right @ new
        bets = _shift_bets(stable, candidate, max_shift, np.minimum(batches, _UNITS))
        there = stable
    else:
        counts = now.counts.at(one.level)
        windows, right = counts.windows, counts.counts.astype(np.float64)
        batches, candidate = right[:, BATCHES], right @ new
        totals = before.counts.totals.astype(np.float64) @ old
        max_shift = shift_drift(before.counts, old, max(max_shift, _LONE_SHIFT))
        bets = _lone_shift_bets(totals, int(before.counts.totals[BATCHES]), candidate, max_shift, batches)
        there = np.tile(totals, (len(windows), 1))
    found = since(bets)
    if len(windows) - found.first < _LEAST_OUTPUT_WINDOWS:
        return Sign("outputs")
    was, is_now = _mix(there[found.first :]), _mix(candidate[found.first :])
    shift = float(np.maximum(is_now - was, 0).sum())
    most = int((is_now - was).argmax())
    reason = (
        f"output {name!r} is {_called(labels[most])} in {is_now[most]:.1%} of the rows "
        f"{one.ago(int(windows[found.first]))}, the stable version's in {was[most]:.1%}"
    )
    figures: dict[str, JSON] = {
        "output": name,
        "category": labels[most],
        "stable_share": round(float(was[most]), 4),
        "candidate_share": round(float(is_now[most]), 4),
        "shift": round(shift, 4),
    }
    return Sign("outputs", found.log_e, shift > max_shift, reason, figures)


def _mix(counts: Floats) -> Floats:
    sums: Floats = counts.sum(axis=0)
    return sums / max(float(sums.sum()), 1.0)


def _called(label: int | None) -> str:
    return f"of category {label}" if label is not None else "of a rare category"


def _aligned(before: OutputCounts, now: OutputCounts) -> tuple[list[int | None], Floats, Floats]:
    """Returns the categories to compare, None for all others, and what makes counts of them of each one's columns."""
    old, new = set(before.labels), set(now.labels)
    # A version that ran out of columns counts the same category elsewhere than the other version.
    kept = sorted(old & new if before.full or now.full else old | new)
    place = {label: number for number, label in enumerate(kept)}
    return [*kept, None], _projection(before, place), _projection(now, place)


def _projection(own: OutputCounts, place: Mapping[int, int]) -> Floats:
    matrix = np.zeros((len(own.counts.totals), len(place) + 1))
    matrix[OTHER, -1] = 1.0
    for number, label in enumerate(own.labels):
        matrix[LABELS + number, place.get(label, len(place))] = 1.0
    return matrix


def _shift_bets(stable: Floats, candidate: Floats, max_shift: float, units: Floats) -> Floats:
    """Returns bets that the candidate's categories are the stable version's but for ``max_shift`` of the rows.

    A hit is a row of a category that the candidate has had too often in the windows before, all of them
    or the latest.
    """
    of, stable_of = candidate.sum(axis=1), stable.sum(axis=1)
    expected = stable * (of / np.maximum(stable_of, 1))[:, np.newaxis]
    return np.concatenate(
        [
            paired(
                Shares((candidate * suspect).sum(axis=1), of, (stable * suspect).sum(axis=1), stable_of),
                max_shift,
                units,
            )
            for suspect in _suspects(candidate - expected)
        ]
    )


def _lone_shift_bets(totals: Floats, batches: int, candidate: Floats, max_shift: float, batches_now: Floats) -> Floats:
    """Returns the same for a stable version that was at work earlier."""
    of = candidate.sum(axis=1)
    mix = totals / max(float(totals.sum()), 1.0)
    slack = math.sqrt(math.log(1e6) / (2 * max(batches, 1)))
    bets: list[Floats] = []
    for suspect in _suspects(candidate - of[:, np.newaxis] * mix):
        share = suspect @ mix + slack
        limit = share + max_shift * (1 - share)
        bets.append(single((candidate * suspect).sum(axis=1), of, limit, np.minimum(batches_now, 1.0)))
    return np.concatenate(bets)


def _suspects(excess: Floats) -> list[Floats]:
    """Returns the categories with an excess in the windows before each: in all of them, and in the latest."""
    below = np.zeros((len(excess) + 1, excess.shape[1]))
    np.cumsum(excess, axis=0, out=below[1:])
    rows = np.arange(len(excess))
    lately = below[rows] - below[np.maximum(rows - _LATELY, 0)]
    return [(below[:-1] > 0).astype(np.float64), (lately > 0).astype(np.float64)]
