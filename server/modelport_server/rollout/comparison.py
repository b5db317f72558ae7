"""Whether a candidate does worse than the stable version: statistics that may be looked at all the time.

What is compared is in ``signs``, the tests behind it in ``sequential``. ``docs/rollout-statistics.md`` says
how sure a verdict is, how soon it comes, and how that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from modelport_registry import JSON
from modelport_server.rollout.evidence import CALLER_FAULTS, FAILED, EvidenceSnapshot, quantile
from modelport_server.rollout.signs import (
    LEAST_STABLE,
    Sign,
    View,
    engine_time,
    errors,
    first_ratio,
    latency,
    outputs,
    view,
)

_ALARMS = {"errors": 0.5, "latency": 0.125, "engine": 0.125, "non-finite": 0.125, "outputs": 0.125}
"""How the false alarms that are accepted are divided: errors are rare, and each has to say much."""
_LEAST_WINDOWS = 4
_HANG_S = 2.0
_HANG_RATIO = 20.0
_HANG_LONGEST = 3.0


class VerdictKind(Enum):
    """What the evidence says."""

    WORSE = "worse"
    FINE = "fine"
    WAITING = "waiting"
    """There is too little of it to tell."""
    DOUBTFUL = "doubtful"
    """It may be worse, and it takes more evidence to be sure."""


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
    """How much worse a candidate may be, and how sure one has to be of it."""

    max_error_increase: float = 0.002
    """By how much its share of failed calls may be larger, absolute."""
    max_latency_ratio: float = 1.5
    """How many times as long it may take, in the median."""
    max_output_shift: float = 0.1
    """Which share of the rows may be of another category, as the total variation distance; 0 to 1."""
    min_calls: int = 100
    """How many calls it must have had before it can be called fine."""
    false_alarm: float = 2e-5
    """How likely a candidate that is as good is called worse in one step, over all looks at it."""
    suspicion: float = 0.05
    """How likely a sign must be by chance for a candidate to be called fine in spite of it."""

    def __post_init__(self) -> None:
        if not (0 < self.false_alarm < 1 and 0 < self.suspicion < 1):
            raise ValueError("false_alarm and suspicion must be between 0 and 1")


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
    one = view(stable, candidate, concurrent=concurrent)
    figures = _figures(stable, candidate)
    if hang := _hang(stable, candidate):
        return Verdict(VerdictKind.WORSE, hang, figures)
    signs = _signs(one, limits, concurrent=concurrent)
    if signs and _sure(signs[0]) >= math.log(1 / limits.false_alarm):
        return Verdict(VerdictKind.WORSE, signs[0].reason, {**figures, **_of_sign(signs[0])})
    if signs and _sure(signs[0]) >= math.log(1 / limits.suspicion):
        return Verdict(VerdictKind.DOUBTFUL, f"it may be worse: {signs[0].reason}", {**figures, **_of_sign(signs[0])})
    if why := _more_errors(stable, candidate, limits, concurrent=concurrent):
        return Verdict(VerdictKind.DOUBTFUL, f"it may be worse: {why}", figures)
    if why := _too_little(stable, candidate, limits):
        return Verdict(VerdictKind.WAITING, why, figures)
    at_first = first_ratio(one)
    if at_first is None:
        why = f"too few calls, or too short a time, to tell how long its engine takes: {candidate.ended} so far"
        return Verdict(VerdictKind.WAITING, why, figures)
    if at_first > 1:
        figures["first_ratio"] = round(at_first, 3)
    return Verdict(VerdictKind.FINE, f"no worse in {candidate.ended} calls", figures)


def _more_errors(
    stable: EvidenceSnapshot, candidate: EvidenceSnapshot, limits: ComparisonLimits, *, concurrent: bool
) -> str:
    """Returns what is to be said where more calls fail than may, be it by chance."""
    if not candidate.ended:
        return ""
    columns = [FAILED, CALLER_FAULTS] if concurrent else [FAILED]
    before, now = (int(seen.calls.totals[columns].sum()) for seen in (stable, candidate))
    share = before / max(stable.ended, 1)
    chance = math.sqrt(share * (1 - share) / candidate.ended)  # one standard deviation, if it is as good
    if now / candidate.ended <= share + limits.max_error_increase + chance:
        return ""
    return f"{now} of {candidate.ended} calls failed, {before} of the stable version's {stable.ended}"


def _signs(one: View, limits: ComparisonLimits, *, concurrent: bool) -> list[Sign]:
    """Returns the signs that are beyond the limits, the surest first."""
    found = [
        errors(one, limits.max_error_increase, caller_faults=concurrent),
        engine_time(one, limits.max_latency_ratio),
        *outputs(one, limits.max_output_shift),
    ]
    if concurrent:
        found.append(latency(one, limits.max_latency_ratio))
    return sorted((sign for sign in found if sign.real), key=_sure, reverse=True)


def _sure(sign: Sign) -> float:
    """Returns the logarithm of how much speaks for a sign, as one of several that are looked for."""
    return sign.log_e + math.log(_ALARMS[sign.name])


def _figures(stable: EvidenceSnapshot, candidate: EvidenceSnapshot) -> dict[str, JSON]:
    figures: dict[str, JSON] = {}
    for name, seen in (("stable", stable), ("candidate", candidate)):
        figures[f"{name}_calls"] = seen.ended
        figures[f"{name}_errors"] = int(seen.calls.totals[FAILED] + seen.calls.totals[CALLER_FAULTS])
        figures[f"{name}_p50_ms"] = round(quantile(seen.times, 0.5) * 1e3, 3)
    return figures


def _of_sign(sign: Sign) -> dict[str, JSON]:
    return {"sign": sign.name, "log_e": round(sign.log_e, 2), "seen": dict(sign.figures)}


def _too_little(stable: EvidenceSnapshot, candidate: EvidenceSnapshot, limits: ComparisonLimits) -> str:
    """Returns why there is too little evidence to call a candidate fine."""
    if candidate.ended < limits.min_calls:
        return f"{candidate.ended} of the {limits.min_calls} calls that it takes to tell"
    least = min(LEAST_STABLE, limits.min_calls)
    if 0 < stable.ended < least:
        return f"{stable.ended} of the {least} calls of the stable version that it takes to tell"
    if candidate.calls.level == 0 and len(candidate.calls.windows) < _LEAST_WINDOWS:
        return f"all of its {candidate.ended} calls came within a second: it takes some that come later"
    return ""


def _hang(stable: EvidenceSnapshot, candidate: EvidenceSnapshot) -> str:
    """Returns what is to be said of a candidate that lets calls wait as the stable version never did."""
    if stable.ended < LEAST_STABLE or not stable.times.any():
        return ""
    longest_s, usual_s = quantile(stable.times, 1.0), quantile(stable.times, 0.99)
    limit_s = max(_HANG_S, _HANG_LONGEST * longest_s, _HANG_RATIO * usual_s, 2 * stable.oldest_wait_s)
    if candidate.oldest_wait_s <= limit_s:
        return ""
    return (
        f"it has not answered for {candidate.oldest_wait_s:.1f} s while a call waits; "
        f"the stable version took {longest_s:.3g} s at most"
    )
