"""``python -m bench shadow``: what callers notice of copies of all their calls.

A stretch without a rollout (A) and one in which every call is copied to a candidate (B) are measured in turns, and
the p99 of the calls in B is compared with that in A right before it. The candidate is the same model again; it is
loaded and leaves between the stretches. There are three loads: calls at a low rate, one caller who calls again at
once, and many such callers, who leave no processor time to spare.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import figures, machine, models
from bench.caller import Caller, Calls
from bench.loading import SMALL, publish, request, wait_in_charge
from bench.machine import Usage
from bench.stage import Server, say, serving, wait_for
from modelport import Client
from modelport_registry import Phase, Registry, RolloutPolicy, Strategy

STABLE, CANDIDATE = 1, 2
_EVER_S = 86_400.0
_WAIT_S = 300.0
_QUIET_S = 600.0
_SHADOWED = RolloutPolicy(
    strategy=(Strategy.MANUAL, Strategy.SHADOW),
    shadow_share=1.0,
    shadow_bake_s=_EVER_S,
    max_latency_ratio=1e6,  # where nothing is to spare the candidate is slow, and is to stay nevertheless
    watch_s=0.0,
    keep_warm_s=0.0,
)


@dataclass(frozen=True, slots=True)
class Load:
    """How callers call."""

    name: str
    connections: int
    interval_s: float = 0.0


LOADS = (
    Load("100 calls/s", 1, 0.01),
    Load("1 caller, at once again", 1),
    Load("32 callers, at once again", 32),
)
_BY_NAME = {load.name: load for load in LOADS}


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of time."""

    before: Usage
    after: Usage

    @staticmethod
    def of(seconds: float) -> Stretch:
        """Returns the stretch that begins now, when it is over."""
        before = Usage.now()
        time.sleep(seconds)
        return Stretch(before, Usage.now())

    def summary(self, calls: Calls) -> dict[str, Any]:
        """Returns its figures."""
        inside = calls.between(self.before.at_s, self.after.at_s)
        return {
            "calls": len(inside.took_ms),
            "calls_per_s": round(len(inside.took_ms) / (self.after.at_s - self.before.at_s), 1),
            "failed": int((inside.version == 0).sum()),
            "call_ms": figures.percentiles(inside.took_ms),
            "our_cores": round(self.before.ours(self.after), 3),
            "others_cores": round(self.before.others(self.after), 3),
            "stolen_cores": round(self.before.stolen(self.after), 4),
        }


@dataclass(frozen=True, slots=True)
class Round:
    """A stretch without copies, one with them, and what became of the calls in the latter."""

    without: Stretch
    shadowed: Stretch
    copied: int
    dropped: int
    agreement: dict[str, float]

    def others(self) -> float:
        """Returns how many cores others kept busy, in the worse of both stretches."""
        return max(one.before.others(one.after) for one in (self.without, self.shadowed))


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that is there while it runs."""

    registry: Registry
    server: Server
    client: Client
    folder: Path
    options: argparse.Namespace

    def measure(self, load: Load) -> list[dict[str, Any]]:
        """Returns the figures of all rounds at a load."""
        folder = self.folder / f"caller-{load.connections}-{load.interval_s}"
        caller = Caller(
            self.server.address, request(), folder, connections=load.connections, interval_s=load.interval_s
        )
        with caller:
            rounds = self._rounds(load, caller)
            calls = caller.stop()
        return [_summary(load, one, calls) for one in rounds]

    def _rounds(self, load: Load, caller: Caller) -> list[Round]:
        wanted, limit = self.options.rounds, self.options.others
        rounds: list[Round] = []
        while sum(one.others() <= limit for one in rounds) < wanted and len(rounds) < 2 * wanted:
            if not machine.wait_quiet(limit, _QUIET_S):
                say("other processes keep the machine busy: the figures will not be good")
            rounds.append(self._round())
            caller.check()
            say(f"{load.name}: round {len(rounds)}; others had {rounds[-1].others():.2f} cores")
        return sorted(rounds, key=Round.others)[:wanted]

    def _round(self) -> Round:
        without = Stretch.of(self.options.seconds)
        with self._shadow():
            before = self._counts()
            shadowed = Stretch.of(self.options.seconds)
            after = self._counts()
        copied, dropped = (int(after[name]) - int(before[name]) for name in ("copied", "dropped"))
        return Round(without, shadowed, copied, dropped, dict(after["agreement"]))

    @contextmanager
    def _shadow(self) -> Generator[None]:
        """Lets the candidate get copies meanwhile."""
        if CANDIDATE in self.registry.state(SMALL).rejected:
            self.registry.approve(SMALL, CANDIDATE)
        else:
            self.registry.start_rollout(SMALL, CANDIDATE)
        wait_for(self._is_shadowed, "calls to be copied or dropped", self.server.alive, _WAIT_S)
        yield
        self.registry.rollback(SMALL, reason="measured")
        self.server.wait_engines(1, self.server.alive)

    def _is_shadowed(self) -> bool:
        rollout = self.registry.state(SMALL).rollout
        if rollout is None:
            sys.exit(f"error: the candidate is gone: {self.registry.state(SMALL).rejected}")
        seen = self._counts()  # with nothing to spare, all copies are dropped
        return rollout.phase is Phase.STEP and bool(seen.get("copied", 0) + seen.get("dropped", 0))

    def _counts(self) -> Any:
        return self.client.rollouts.get(SMALL).figures


def _summary(load: Load, one: Round, calls: Calls) -> dict[str, Any]:
    without, shadowed = one.without.summary(calls), one.shadowed.summary(calls)
    return {
        "load": load.name,
        "without": without,
        "shadowed": shadowed,
        "ratio": figures.ratios(shadowed["call_ms"], without["call_ms"]),
        "copied": one.copied,
        "dropped": one.dropped,
        "copied_share": round(one.copied / max(1, one.copied + one.dropped), 4),
        "agreement": one.agreement,
    }


def run(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the figures of all rounds at all loads."""
    sources = models.made(folder / "models", quick=True)
    registry = Registry(folder / "registry")
    for _ in (STABLE, CANDIDATE):
        publish(registry, SMALL, sources / SMALL)
    registry.set_policy(SMALL, _SHADOWED)
    registry.pin(SMALL, STABLE)
    registry.unpin(SMALL)
    with serving(registry.root, folder) as server, Client(server.address) as client:
        wait_in_charge(registry, SMALL, STABLE, server.alive)
        bench = Bench(registry, server, client, folder, options)
        return [row for load in options.loads for row in bench.measure(load)]


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints what was found."""
    table = Table(title=f"medians of {options.rounds} rounds of {options.seconds:g} s each (lowest to highest)")
    for heading in ("", *(load.name for load in options.loads)):
        table.add_column(heading)
    lines: dict[str, tuple[int, tuple[str, ...]]] = {
        "calls/s without": (0, ("without", "calls_per_s")),
        "calls/s, ours copied": (0, ("shadowed", "calls_per_s")),
        "p99 without, ms": (3, ("without", "call_ms", "p99")),
        "p99 with, ms": (3, ("shadowed", "call_ms", "p99")),
        "p50, ratio": (3, ("ratio", "p50")),
        "p99, ratio": (3, ("ratio", "p99")),
        "p99.9, ratio": (3, ("ratio", "p99.9")),
        "failed calls": (0, ("shadowed", "failed")),
        "copied": (0, ("copied",)),
        "dropped": (0, ("dropped",)),
        "cores busy without": (2, ("without", "our_cores")),
        "cores busy with": (2, ("shadowed", "our_cores")),
        "cores that others kept busy": (3, ("shadowed", "others_cores")),
    }
    for title, (digits, path) in lines.items():
        of = [[row for row in rows if row["load"] == load.name] for load in options.loads]
        table.add_row(title, *(figures.spread(figures.at(group, *path), digits) for group in of))
    Console(width=130).print(table)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="python -m bench shadow", description="Measure calls that are copied.")
    parser.add_argument("--rounds", type=int, default=7, help="rounds at each load (default 7)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each stretch (default 20)")
    parser.add_argument(
        "--others", type=float, default=0.05, help="cores that others may use before a round is repeated (default 0.05)"
    )
    parser.add_argument(
        "--load", action="append", choices=list(_BY_NAME), help="only this load; repeat for more (default: all)"
    )
    parser.add_argument("--json", type=Path, default=Path("build/bench/shadow.json"), help="where figures go")
    parser.add_argument("--quick", action="store_true", help="one short round each: shows that it runs")
    options = parser.parse_args(arguments)
    options.loads = [_BY_NAME[name] for name in options.load or _BY_NAME]
    if options.quick:
        options.rounds, options.seconds, options.others = 1, 2.0, float("inf")
    return options


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        rows = run(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about = machine.describe()
    figures.write(options.json, {"benchmark": "shadow", "machine": about, "rounds": rows})
    report(rows, options)
    print(f"{about['text']}; the callers, on a Unix socket, share it; all figures are in {options.json}")
