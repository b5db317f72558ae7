"""Measures how often healthy candidates are taken for bad ones, and how soon bad ones are found out.

Run ``python -m tests.support.rollout_rates`` for the tables of ``docs/rollout-statistics.md``.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from modelport_server.rollout.comparison import ComparisonLimits, Verdict, VerdictKind, compare
from tests.support.simulated_rollouts import Fault, World, looks, watch_looks

STEP, WATCH = "step", "watch"
SHARES = (0.01, 0.1, 0.5)
STEP_S = 60.0
LOOKS = 4
"""After how many windows a healthy rollout is looked at."""
PLACES = ((1000.0, 0.01), (100.0, 0.01), (1000.0, 0.1), (1000.0, 0.5))
LIMITS = ComparisonLimits()
WORLDS = {
    "steady, 1,000 calls/s": World(),
    "wide spread of times, 300 calls/s": World(calls_per_s=300, spread=0.8),
    "batches of 8 that take the same, a fifth of the time 4 times slower": World(
        together=8, slow_share=0.2, spread=0.6
    ),
    "traffic, times and mix of classes wander": World(drift=1.0),
    "5% errors of both": World(errors=0.05),
    "both fail 30% in a tenth of the time": World(slow_share=0.1, errors_when_slow=0.3),
    "few, rare classes": World(even=0.3, drift=0.3),
    "8 calls/s": World(calls_per_s=8, drift=0.5),
    "a candidate with few calls takes 1.8 times as long": World(calls_per_s=400, median_s=0.001, cold=1.8),
    "the same, and everything wanders and is slow at times": World(
        calls_per_s=200,
        median_s=0.001,
        cold=1.8,
        drift=0.5,
        slow_share=0.2,  # too few calls to keep it busy even then
    ),
    "the same, wide spread of times, 2.2 times as long": World(
        calls_per_s=400, median_s=0.002, cold=2.2, spread=0.6, together=2
    ),
    "1.5 times as long for few calls, and one in 50 of the stable version's batches is as small": World(
        calls_per_s=300, cold=1.5, spread=0.4, alike=0.02
    ),
    "1.5 times as long for few calls, and one in 2,000 is": World(calls_per_s=300, cold=1.5, spread=0.4, alike=0.0005),
    "worse, within the limits: 0.1% errors, 1.2 times the time, 5% of the rows otherwise": World(
        fault=Fault(errors=0.001, slower=1.2, one_class=0.05)
    ),
}


@dataclass(frozen=True, slots=True)
class Sick:
    """A candidate with a fault."""

    fault: Fault
    begins_s: Sequence[float] = (0.0, 2.0, 10.0)
    """After how many seconds the fault begins, one as likely as another."""
    median_s: float = 0.004
    cold: float = 1.0

    def world(self, calls_per_s: float = 1000.0, share: float = 0.01) -> World:
        """Returns where it shows."""
        return World(calls_per_s=calls_per_s, share=share, fault=self.fault, median_s=self.median_s, cold=self.cold)


FAULTS = {
    "5% of the calls fail": Sick(Fault(errors=0.05)),
    "twice the time, 20 ms": Sick(Fault(slower=2.0), median_s=0.02),
    "twice the time, 1 ms, from 10 s on": Sick(Fault(slower=2.0), (10.0,), 0.001, 1.6),
    "1.8 times the time, 1 ms, from the start": Sick(Fault(slower=1.8), (0.0,), 0.001, 1.3),
    "a single class": Sick(Fault(one_class=1.0)),
    "NaN in 10% of the rows": Sick(Fault(non_finite=0.1)),
}
SEEN_WITH_AS_MANY_CALLS = "1.8 times the time, 1 ms, from the start"
"""What can't be told from an engine that has few calls."""


@dataclass(frozen=True, slots=True)
class Detection:
    """When a fault was found: infinite if it was not."""

    seconds: float
    calls: float
    """The candidate's since its fault began."""


def interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the exact confidence interval of a share (Clopper & Pearson 1934)."""
    tail = (1 - confidence) / 2
    low = _share_where(count - 1, total, 1 - tail) if count else 0.0
    high = _share_where(count, total, tail) if count < total else 1.0
    return low, high


def _at_most(count: int, total: int, share: float) -> float:
    """Returns how likely there are at most so many, each with a probability of ``share``."""
    if count < 0:
        return 0.0
    ks = np.arange(count + 1)
    ways = np.array([math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in ks])
    return float(np.exp(ways + ks * math.log(share) + (total - ks) * math.log1p(-share)).sum())


def _share_where(most: int, total: int, chance: float) -> float:
    """Returns the share at which it has this chance that there are at most so many."""
    low, high = 1e-12, 1 - 1e-12
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(most, total, middle) > chance else (low, middle)
    return (low + high) / 2


def healthy(world: World, seed: int) -> tuple[str, Verdict] | None:
    """Returns where and why a rollout of three steps and a watch was rolled back; None if it was not."""
    rng = np.random.default_rng(seed)
    world = replace(world, seconds=STEP_S)
    for share in SHARES:
        for look in looks(replace(world, share=share), rng, LOOKS):
            verdict = compare(look.stable, look.candidate, LIMITS)
            if verdict.kind is VerdictKind.WORSE:
                return STEP, verdict
    found = _in_watch(world, rng)
    return (WATCH, found) if found is not None else None


def in_watch(world: World, seed: int) -> Verdict | None:
    """Returns why a version is rolled back in its watch, before which there is a step; None if it is not."""
    return _in_watch(world, np.random.default_rng(seed))


def _in_watch(world: World, rng: np.random.Generator) -> Verdict | None:
    for look in watch_looks(world, rng, LOOKS):
        verdict = compare(look.stable, look.candidate, LIMITS, concurrent=False)
        if verdict.kind is VerdictKind.WORSE:
            return verdict
    return None


def detection(world: World, begins_s: Sequence[float], seed: int) -> Detection:
    """Returns when the fault of a world is found, which begins at one of some moments."""
    rng = np.random.default_rng(seed)
    begin_s = float(rng.choice(begins_s))
    before = 0
    # Where the candidate gets few calls, a step takes longer to tell.
    seconds = max(60.0, 240 / (world.calls_per_s * world.share))
    world = replace(world, seconds=seconds, fault=replace(world.fault, at_s=begin_s))
    for look in looks(world, rng, int(seconds / 60)):
        if look.at_s <= begin_s:
            before = look.candidate.ended
        if compare(look.stable, look.candidate, LIMITS).kind is VerdictKind.WORSE:
            return Detection(look.at_s - begin_s, look.candidate.ended - before)
    return Detection(math.inf, math.inf)


def healthy_table(rollouts: int, pool: Executor) -> Iterator[str]:
    """Yields the lines of the table of false rollbacks."""
    yield "| both versions | rollouts | rolled back in a step | 95% confidence | in the watch | 95% confidence |"
    yield "| --- | --- | --- | --- | --- | --- |"
    bad = {STEP: 0, WATCH: 0}
    for name, world in WORLDS.items():
        ends = [end for end in pool.map(partial(healthy, world), range(rollouts)) if end is not None]
        for place, verdict in ends:
            bad[place] += 1
            print(f"{name}: {place}: {verdict.reason}", file=sys.stderr)
        places = [place for place, _ in ends]
        yield _row(name, places.count(STEP), places.count(WATCH), rollouts)
    yield _row("all", bad[STEP], bad[WATCH], rollouts * len(WORLDS))


def _row(name: str, step: int, watch: int, total: int) -> str:
    return f"| {name} | {total:,} | {step} | {_range(step, total)} | {watch} | {_range(watch, total)} |"


def _range(count: int, total: int) -> str:
    low, high = interval(count, total)
    return f"{low:.2%} to {high:.2%}"


def detections(name: str, calls_per_s: float, share: float, count: int, pool: Executor) -> list[Detection]:
    """Returns when a fault was found in each of so many simulated steps."""
    sick = FAULTS[name]
    return list(pool.map(partial(detection, sick.world(calls_per_s, share), sick.begins_s), range(count)))


def power_table(found: Mapping[tuple[str, float, float], Sequence[Detection]]) -> Iterator[str]:
    """Yields the lines of the table of how soon faults are found."""
    yield "| fault | calls/s | share | found | calls of the candidate: median, 90%, 99% | seconds: median, 90%, 99% |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (name, calls_per_s, share), all_of in found.items():
        seen = sum(math.isfinite(one.calls) for one in all_of) / len(all_of)
        calls, seconds = _quantiles([one.calls for one in all_of]), _quantiles([one.seconds for one in all_of])
        yield (
            f"| {name} | {calls_per_s:,.0f} | {share:.0%} | {seen:.1%} "
            f"| {', '.join(f'{value:,.0f}' for value in calls)} | {', '.join(f'{value:.1f}' for value in seconds)} |"
        )


def _quantiles(values: Sequence[float]) -> list[float]:
    return [float(value) for value in np.quantile(values, (0.5, 0.9, 0.99), method="inverted_cdf")]


def draw(found: Mapping[tuple[str, float, float], Sequence[Detection]], path: Path) -> None:
    """Draws how soon faults are found in a canary of 1%."""
    import matplotlib as mpl

    mpl.use("Agg")
    plt: Any = importlib.import_module("matplotlib.pyplot")  # its own types are partly unknown
    figure = plt.figure(figsize=(8, 4))
    axes = figure.add_subplot()
    for (name, calls_per_s, share), all_of in found.items():
        if (calls_per_s, share) == (1000, 0.01):
            calls = sorted(one.calls for one in all_of)
            axes.step(calls, np.arange(1, len(calls) + 1) / len(calls), label=name, where="post")
    axes.set_xlim(0, 250)
    axes.set_ylim(0, 1)
    axes.set_xlabel("calls of the candidate since the fault began (1% of 1,000 calls/s)")
    axes.set_ylabel("share of the steps rolled back")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Prints the tables and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=250, help="healthy ones for each kind of traffic")
    parser.add_argument("--steps", type=int, default=200, help="bad ones for each fault")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--picture", type=Path, default=None)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as pool:
        cases = [(name, *place) for place in PLACES for name in FAULTS]
        found = {case: detections(*case, options.steps, pool) for case in cases}
        print("\n".join(power_table(found)), flush=True)
        if options.picture is not None:
            draw(found, options.picture)
        for line in healthy_table(options.rollouts, pool):
            print(line, flush=True)


if __name__ == "__main__":
    main()
