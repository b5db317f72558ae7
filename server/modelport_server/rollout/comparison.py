"""Whether a candidate does worse than the stable version: statistics that may be looked at all the time.

Everything is reduced to shares: of calls that failed, of calls that were slow, of rows of one category.
Each share is tested by the same sequential test, see ``worse_share``. ``docs/rollout-statistics.md``
says what is tested with which error rates, and how that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from modelport_registry import JSON
from modelport_server.rollout.evidence import NON_FINITE, EvidenceSnapshot, Tally

ALPHA = 1e-5
"""How likely one test is to find a healthy version worse, over all the times that it is looked at."""
_POINTS = 64
_WINDOW_WEIGHT = 5.0
"""How many independent calls the calls of one window are worth at most."""
_LEAST_WINDOWS = 4
_LATENCY_MARGIN = 0.25
_LATENCY_FLOOR_S = 0.0005
"""A difference of latencies that nobody notices; an engine with little to do is a little slower for that."""
_CATEGORY_MARGIN = 0.15
_NON_FINITE_MARGIN = 0.002
_LEAST_STABLE = 30
_HANG_S = 2.0
_HANG_RATIO = 20.0


class VerdictKind(Enum):
    """What the evidence says."""

    WORSE = "worse"
    FINE = "fine"
    WAITING = "waiting"
    """There is too little of it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the evidence says, and why."""

    kind: VerdictKind
    reason: str
    """In one line, for people."""
    figures: Mapping[str, JSON] = field(default_factory=dict[str, JSON])
    """The numbers behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonLimits:
    """How much worse a candidate may be."""

    max_error_increase: float = 0.002
    """By how much its share of failed calls may be larger, absolute."""
    max_latency_ratio: float = 1.5
    """How many times as long it may take."""
    min_calls: int = 100
    """How many calls it must have had before it can be called fine."""


def compare(
    stable: EvidenceSnapshot, candidate: EvidenceSnapshot, limits: ComparisonLimits, *, concurrent: bool = True
) -> Verdict:
    """Returns how a candidate does beside the stable version.

    Args:
        stable: what the stable version did.
        candidate: what the candidate did.
        limits: how much worse it may be.
        concurrent: whether both had their share of the same calls at the same time. If not, what depends
            on the callers is left out: calls that blame the inputs, and times that include waiting.
    """
    figures: dict[str, JSON] = {"stable_calls": stable.calls, "candidate_calls": candidate.calls}
    tests = (
        _errors(stable, candidate, limits, figures, concurrent),
        _latency(stable, candidate, limits, figures) if concurrent else "",
        _engine_time(stable, candidate, limits, figures),
        _outputs(stable, candidate, figures),
        _hang(stable, candidate, figures),
    )
    reason = next((found for found in tests if found), "")
    if reason:
        return Verdict(VerdictKind.WORSE, reason, figures)
    if candidate.calls < limits.min_calls:
        text = f"{candidate.calls} of the {limits.min_calls} calls that it takes to tell"
        return Verdict(VerdictKind.WAITING, text, figures)
    if candidate.windows < _LEAST_WINDOWS:
        return Verdict(VerdictKind.WAITING, "its calls came all at once", figures)
    return Verdict(VerdictKind.FINE, f"no worse in {candidate.calls} calls", figures)


def _errors(
    stable: EvidenceSnapshot,
    candidate: EvidenceSnapshot,
    limits: ComparisonLimits,
    figures: dict[str, JSON],
    concurrent: bool,
) -> str:
    before = stable.failed + (stable.caller_faults if concurrent else 0)
    now = candidate.failed + (candidate.caller_faults if concurrent else 0)
    figures["stable_errors"], figures["candidate_errors"] = before, now
    if not worse_share(before, stable.calls, now, candidate.calls, limits.max_error_increase):
        return ""
    return f"{now} of {candidate.calls} calls failed, of the stable version's {before} of {stable.calls}"


def _latency(
    stable: EvidenceSnapshot, candidate: EvidenceSnapshot, limits: ComparisonLimits, figures: dict[str, JSON]
) -> str:
    before, now = stable.latency.quantile(0.5), candidate.latency.quantile(0.5)
    figures["stable_p50_ms"], figures["candidate_p50_ms"] = round(before * 1e3, 3), round(now * 1e3, 3)
    if not slower(stable.latency, candidate.latency, limits.max_latency_ratio):
        return ""
    return f"calls take {now * 1e3:.3g} ms in the median, the stable version's {before * 1e3:.3g} ms"


def _engine_time(
    stable: EvidenceSnapshot, candidate: EvidenceSnapshot, limits: ComparisonLimits, figures: dict[str, JSON]
) -> str:
    """Compares batches of about the same size: under load the stable version's are larger."""
    for key in sorted(candidate.engine.keys() & stable.engine.keys()):
        before, now = stable.engine[key], candidate.engine[key]
        if slower(before, now, limits.max_latency_ratio):
            rows = 1 << (key[1] - 1)
            figures["engine_rows"] = rows
            figures["stable_engine_ms"] = round(before.quantile(0.5) * 1e3, 3)
            figures["candidate_engine_ms"] = round(now.quantile(0.5) * 1e3, 3)
            return (
                f"batches of {rows} rows and more take {now.quantile(0.5) * 1e3:.3g} ms in the median, "
                f"the stable version's {before.quantile(0.5) * 1e3:.3g} ms"
            )
    return ""


def slower(before: Tally, now: Tally, ratio: float) -> bool:
    """Returns whether times have become longer by more than ``ratio``, in the median and beyond chance."""
    if before.total < _LEAST_STABLE or now.windows < _LEAST_WINDOWS:
        return False
    limit_s = before.quantile(0.5) * ratio + _LATENCY_FLOOR_S
    if now.quantile(0.5) <= limit_s:
        return False
    weight = _weight(now)
    return worse_share(
        before.above(limit_s), before.total, now.above(limit_s) * weight, now.total * weight, _LATENCY_MARGIN
    )


def _weight(tally: Tally) -> float:
    """Returns what one count is worth: those of one window are not independent of each other."""
    return min(1.0, _WINDOW_WEIGHT * tally.windows / tally.total) if tally.total else 1.0


def _outputs(stable: EvidenceSnapshot, candidate: EvidenceSnapshot, figures: dict[str, JSON]) -> str:
    for key, now in sorted(candidate.outputs.items()):
        before = stable.outputs.get(key)
        if before is None or before.total < _LEAST_STABLE or now.windows < _LEAST_WINDOWS:
            continue
        for category, margin in _suspects(before, now):
            weight, count = _weight(now), before.counts.get(category, 0.0)
            alpha = ALPHA / max(len(now.counts), 1)
            if worse_share(count, before.total, now.counts[category] * weight, now.total * weight, margin, alpha):
                share, was = now.counts[category] / now.total, count / before.total
                figures["output"], figures["category"] = key[1], category
                figures["stable_share"], figures["candidate_share"] = round(was, 4), round(share, 4)
                what = "has NaN or infinity" if category == NON_FINITE else f"is in category {category}"
                return f"output {key[1]!r} {what} in {share:.1%} of the rows, the stable version's in {was:.1%}"
    return ""


def _suspects(before: Tally, now: Tally) -> Iterator[tuple[int | str, float]]:
    """Yields the categories that have become much more frequent, each with what it may have."""
    for category, count in now.counts.items():
        margin = _NON_FINITE_MARGIN if category == NON_FINITE else _CATEGORY_MARGIN
        if count / now.total > before.counts.get(category, 0.0) / before.total + margin:
            yield category, margin


def _hang(stable: EvidenceSnapshot, candidate: EvidenceSnapshot, figures: dict[str, JSON]) -> str:
    limit_s = max(_HANG_S, _HANG_RATIO * stable.latency.quantile(0.99))
    if candidate.oldest_wait_s <= max(limit_s, 2 * stable.oldest_wait_s) or stable.calls < _LEAST_STABLE:
        return ""
    figures["oldest_wait_s"] = round(candidate.oldest_wait_s, 3)
    return f"a call has been waiting for {candidate.oldest_wait_s:.1f} s; the stable version's take no such time"


def worse_share(
    before: float, of_before: float, now: float, of_now: float, margin: float, alpha: float = ALPHA
) -> bool:
    """Returns whether a share has risen by more than ``margin``, beyond chance.

    The share before is taken at the upper end of its confidence sequence of level ``alpha`` / 2 (the
    beta-binomial mixture of Robbins 1970). The share now is tested against that plus ``margin`` by the
    likelihood ratio, mixed evenly over all larger shares; it exceeds 2 / ``alpha`` at any time with a
    probability of at most ``alpha`` / 2 (Ville 1939). So the test may be repeated after every call.

    Args:
        before: how many of ``of_before`` there were.
        of_before: how many there could have been.
        now: the same for what is tested.
        of_now: the same.
        margin: the rise that is allowed, absolute.
        alpha: how likely a false alarm may be.
    """
    if of_now <= 0 or now / of_now <= margin:
        return False
    limit = upper_limit(before, of_before, alpha / 2) + margin
    return limit < 1 and now / of_now > limit and log_mixture_ratio(now, of_now, limit) > math.log(2 / alpha)


def upper_limit(count: float, total: float, alpha: float) -> float:
    """Returns the upper end of a share's confidence sequence: valid at all times together.

    A share p is outside once the likelihood, mixed evenly over all shares, is 1 / ``alpha`` times that of p.
    """
    if total <= 0:
        return 1.0
    evidence = math.lgamma(count + 1) + math.lgamma(total - count + 1) - math.lgamma(total + 2)
    low, high = count / total, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if evidence - _log_likelihood(count, total, middle) > math.log(1 / alpha):
            high = middle
        else:
            low = middle
    return high


def log_mixture_ratio(count: float, total: float, limit: float) -> float:
    """Returns the logarithm of the likelihood ratio of all shares above ``limit``, mixed evenly, to ``limit``."""
    shares = limit + (1 - limit) * (np.arange(_POINTS) + 0.5) / _POINTS
    logs = count * np.log(shares) + (total - count) * np.log1p(-shares) - _log_likelihood(count, total, limit)
    highest = float(logs.max())
    return highest + math.log(float(np.exp(logs - highest).mean()))


def _log_likelihood(count: float, total: float, share: float) -> float:
    if share <= 0:
        return 0.0 if count <= 0 else -math.inf
    if share >= 1:
        return 0.0 if count >= total else -math.inf
    return count * math.log(share) + (total - count) * math.log1p(-share)
