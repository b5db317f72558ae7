"""``python -m bench gates``: what callers of a good version notice while bad ones are published and rejected.

One caller makes single calls of one row to the good version, one after another. A quiet stretch (A) and one in
which a bad version is rolled out (B) are measured in turns, for every kind of bad version that the fault tests
know: B is from the start of the rollout until a gate has rejected it, and a while longer, in which its engine is
stopped; without that, what is rejected at once would have too few calls for a p99. Compared is the p99 of the calls
in B with that in A right before it, and once more with all kinds of bad versions taken together.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import figures, machine
from bench.caller import Caller, Calls
from bench.loading import stretch, wait_in_charge
from bench.machine import Usage
from bench.stage import Server, say, serving, wait_for
from modelport.tensors import encode
from modelport.v1 import prediction_pb2 as pb
from modelport_registry import Registry, Rejection, RolloutPolicy, Strategy
from tests.support.bad_versions import DISAGREEING
from tests.support.gate_cases import ARGUMENTS, CASES, MODEL, PROGRAM, STABLE, Case, Publisher

QUICK = tuple({case.gate: case for case in reversed(CASES)}.values())[::-1]
"""The first kind of bad version of every gate."""
_BY_NAME = {case.name: case for case in CASES}
_QUIET_S = 600.0


@dataclass(frozen=True, slots=True)
class Round:
    """One quiet stretch and the rollout after it."""

    case: Case
    version: int
    gate: str
    """Where it was rejected."""
    reason: str
    quiet: tuple[Usage, Usage]
    during: tuple[Usage, Usage]
    """From the start of the rollout until a while after the rejection."""
    rejected_s: float
    """When it was rejected, by the monotonic clock."""

    def others(self) -> float:
        """Returns how many cores others kept busy, in the worse of both stretches."""
        return max(before.others(after) for before, after in (self.quiet, self.during))

    def took_s(self) -> float:
        """Returns how long it took until the version was rejected, in seconds."""
        return self.rejected_s - self.during[0].at_s


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that is there while it runs."""

    publisher: Publisher
    server: Server
    caller: Caller
    options: argparse.Namespace

    def rounds(self) -> list[list[Round]]:
        """Measures every kind in turn, and again what others disturbed; returns the rounds of each that count."""
        wanted, limit = self.options.rounds, self.options.others
        found: dict[str, list[Round]] = {case.name: [] for case in self.options.cases}
        for _ in range(2 * wanted):
            for case in self.options.cases:
                rounds = found[case.name]
                if sum(one.others() <= limit for one in rounds) < wanted:
                    rounds.append(self.round(case))
        return [least_disturbed(rounds, wanted) for rounds in found.values()]

    def round(self, case: Case) -> Round:
        """Measures a quiet stretch and a rollout that fails."""
        version = self.publisher.bad(case)
        if not machine.wait_quiet(self.options.others, _QUIET_S):
            say("other processes keep the machine busy: the figures will not be good")
        quiet = Usage.now()
        time.sleep(self.options.seconds)
        before = Usage.now()
        self.publisher.registry.start_rollout(MODEL, version)
        rejection = self._wait_rejected(version)
        rejected_s = rejection.at.timestamp() - time.time() + time.monotonic()
        time.sleep(self.options.after)
        during = (before, Usage.now())
        result = Round(case, version, rejection.gate, rejection.reason, (quiet, before), during, rejected_s)
        took = f"rejected at {result.gate} after {result.took_s():.2f} s"
        say(f"{case.name}: {took}; others had {result.others():.2f} cores")
        self._settle()
        return result

    def _wait_rejected(self, version: int) -> Rejection:
        """Returns why a version was rejected; ends the benchmark if it takes over."""

        def rejected() -> bool:
            state = self.publisher.registry.state(MODEL)
            if state.aliases.get("stable") != STABLE:
                sys.exit(f"error: bad version {version} passed its gates and took over")
            return version in state.rejected

        wait_for(rejected, f"version {version} to be rejected", self._check)
        return self.publisher.registry.state(MODEL).rejected[version]

    def _settle(self) -> None:
        self.server.wait_engines(1, self._check)

    def _check(self) -> None:
        self.server.alive()
        self.caller.check()


def least_disturbed(rounds: Sequence[Round], wanted: int) -> list[Round]:
    """Returns as many rounds as are wanted, those in which others used the machine least, in order of time."""
    return sorted(sorted(rounds, key=Round.others)[:wanted], key=lambda one: one.during[0].at_s)


def made(folder: Path) -> Path:
    """Returns the folder with all models, made by a process that ends if there are none yet."""
    if not (folder / DISAGREEING).exists():  # the last one
        say("making the models")
        command = [sys.executable, "-m", "tests.support.bad_versions", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"error: the models can't be made: {done.stderr[-2000:]}")
    return folder


def request() -> bytes:
    """Returns the message of every call: one row."""
    row = np.arange(4, dtype=np.float32).reshape(1, 4)
    return pb.PredictRequest(model=MODEL, inputs=[encode("x", row)]).SerializeToString()


def run(folder: Path, options: argparse.Namespace) -> tuple[list[list[Round]], Calls]:
    """Returns the rounds of every kind of bad version, and the caller's calls."""
    registry = Registry(folder / "registry")
    publisher = Publisher(registry, folder / "aside", made(options.models or folder / "models"))
    publisher.good()
    registry.set_policy(MODEL, RolloutPolicy(strategy=(Strategy.MANUAL,), watch_s=0.0, keep_warm_s=0.0))
    registry.start_rollout(MODEL, STABLE)
    with serving(registry.root, folder, *ARGUMENTS, program=PROGRAM) as server:
        wait_in_charge(registry, MODEL, STABLE, server.alive)
        with Caller(server.address, request(), folder / "caller", controls=True) as caller:
            rounds = Bench(publisher, server, caller, options).rounds()
            return rounds, caller.stop()


def summary(one: Round, calls: Calls) -> dict[str, Any]:
    """Returns a round's figures."""
    before, during = (_stretch(usage, calls) for usage in (one.quiet, one.during))
    return {
        "case": one.case.name,
        "version": one.version,
        "gate": one.gate,
        "reason": one.reason,
        "seconds_to_rejection": round(one.took_s(), 3),
        "quiet": before,
        "during": during,
        "ratio": figures.ratios(during["call_ms"], before["call_ms"]),
        "ping_ratio": figures.ratios(during["ping_ms"], before["ping_ms"]),
        "spin_ratio": figures.ratios(during["spin_ms"], before["spin_ms"]),
    }


def _stretch(usage: tuple[Usage, Usage], calls: Calls) -> dict[str, Any]:
    inside = calls.between(usage[0].at_s, usage[1].at_s)
    return stretch(inside, usage) | {"failed": _failed(inside)}


def _failed(calls: Calls) -> int:
    """Returns how many calls the good version did not answer."""
    return int((calls.version != STABLE).sum())


def pooled(rounds: Sequence[Round], calls: Calls) -> dict[str, Any]:
    """Returns the figures of several rounds taken together; ``strictly`` leaves out the while after the rejections."""
    quiet = _pool([(before.at_s, after.at_s) for before, after in (one.quiet for one in rounds)], calls)
    during = _pool([(before.at_s, after.at_s) for before, after in (one.during for one in rounds)], calls)
    strictly = _pool([(one.during[0].at_s, one.rejected_s) for one in rounds], calls)
    return {
        "rounds": len(rounds),
        "seconds_to_rejection": statistics.median(one.took_s() for one in rounds),
        "quiet": quiet,
        "during": during,
        "strictly": strictly,
        "ratio": figures.ratios(during["call_ms"], quiet["call_ms"]),
        "ratio_strictly": figures.ratios(strictly["call_ms"], quiet["call_ms"]),
    }


def _pool(stretches: Sequence[tuple[float, float]], calls: Calls) -> dict[str, Any]:
    inside = [calls.between(start_s, end_s) for start_s, end_s in stretches]
    took_ms = np.concatenate([one.took_ms for one in inside])
    return {
        "calls": len(took_ms),
        "failed": sum(map(_failed, inside)),
        "call_ms": figures.percentiles(took_ms),
    }


def document(rounds: Sequence[Sequence[Round]], calls: Calls) -> dict[str, Any]:
    """Returns all figures."""
    return {
        "benchmark": "gates",
        "machine": machine.describe(),
        "rounds": [summary(one, calls) for group in rounds for one in group],
        "pooled": [pooled(together, calls) for together in zip(*rounds, strict=True)],
        "pooled_over_all_rounds": pooled([one for group in rounds for one in group], calls),
    }


_COLUMNS = (
    "bad version",
    "gate",
    "s to rejection",
    "calls",
    "failed",
    "p50 quiet, ms",
    "p99 quiet, ms",
    "p99 meanwhile, ms",
    "p99, ratio",
)


def report(found: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Prints what was found."""
    table = Table(title=f"medians of {options.rounds} rounds (lowest to highest); calls meanwhile: of all rounds")
    for heading in _COLUMNS:
        table.add_column(heading, no_wrap=heading in (_COLUMNS[0], _COLUMNS[-1]))
    for case in options.cases:
        rows = [row for row in found["rounds"] if row["case"] == case.name]
        gates = ", ".join(dict.fromkeys(row["gate"] for row in rows))
        table.add_row(case.name, gates, *_cells(rows, "during", "ratio"))
    table.add_section()
    table.add_row("all of them", "", *_cells(found["pooled"], "during", "ratio"))
    table.add_row("all, to rejection", "", *_cells(found["pooled"], "strictly", "ratio_strictly"))
    Console(width=150).print(table)


def _cells(rows: Sequence[Mapping[str, Any]], during: str, ratio: str) -> list[str]:
    failed = sum(figures.at(rows, "quiet", "failed")) + sum(figures.at(rows, during, "failed"))
    return [
        figures.median_text(figures.at(rows, "seconds_to_rejection")),
        f"{sum(figures.at(rows, during, 'calls')):.0f}",
        f"{failed:.0f}",
        figures.median_text(figures.at(rows, "quiet", "call_ms", "p50"), 3),
        figures.median_text(figures.at(rows, "quiet", "call_ms", "p99"), 3),
        figures.median_text(figures.at(rows, during, "call_ms", "p99"), 3),
        figures.spread(figures.at(rows, ratio, "p99")),
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="python -m bench gates", description="Measure calls beside bad versions.")
    parser.add_argument("--rounds", type=int, default=3, help="rollouts of each bad version (default 3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="without a rollout before each (default 10)")
    parser.add_argument(
        "--after", type=float, default=2.0, help="seconds after the rejection that are measured too (default 2)"
    )
    parser.add_argument(
        "--case", action="append", choices=list(_BY_NAME), help="only this bad version; repeat for more (default: all)"
    )
    parser.add_argument(
        "--others", type=float, default=0.05, help="cores that others may use before a round is repeated (default 0.05)"
    )
    parser.add_argument("--json", type=Path, default=Path("build/bench/gates.json"), help="where figures go")
    parser.add_argument("--models", type=Path, help="keep the models in this folder, and take them if they are there")
    parser.add_argument(
        "--quick", action="store_true", help="one short round, one bad version per gate: shows that it runs"
    )
    options = parser.parse_args(arguments)
    options.cases = [_BY_NAME[name] for name in options.case or _BY_NAME]
    if options.quick:
        options.rounds, options.seconds, options.after, options.others = 1, 1.0, 0.5, float("inf")
        options.cases = options.cases if options.case else list(QUICK)
    return options


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        rounds, calls = run(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = document(rounds, calls)
    figures.write(options.json, found)
    report(found, options)
    text = found["machine"]["text"]
    print(f"{text}; one caller on a Unix socket shares it; all figures are in {options.json}")
