"""``python -m bench loading``: what callers notice while a version of ResNet-50's size is made ready.

One caller makes single small calls, one after another. A quiet stretch (A) and a rollout (B) are measured in turns:
a rollout from its start, through all gates, until the first call on the new version has been answered. Compared
is the p99 of the calls in B with that in A right before it. Two rollouts are measured: of another model, and of
the very model that is called, whose next version has ResNet-50 as a second signature.

After each call the caller's process measures itself: a loop of fixed length, and a byte to another process and
back. They show what the machine, without any server, does to whoever shares it with a busy process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import figures, machine, models
from bench.caller import Caller, Calls
from bench.machine import Usage
from bench.stage import Server, say, serving, wait_for
from modelport import Client
from modelport.names import DEFAULT_SIGNATURE
from modelport.tensors import encode
from modelport.v1 import prediction_pb2 as pb
from modelport_registry import Registry, RolloutPolicy, Strategy

MODELS = SMALL, RESNET = "small", "resnet"
OTHER_MODEL, SAME_MODEL = "another model", "the same model"
LATER_CALLS = 20
SMALL_LATER_CALLS = 1000
_LOAD_S = 600.0
_QUIET_S = 600.0


@dataclass(frozen=True, slots=True)
class Variant:
    """What is rolled out."""

    name: str
    model: str
    """The model that gets a new version."""
    source: str
    """The folder of that version."""


VARIANTS = (Variant(OTHER_MODEL, RESNET, "resnet"), Variant(SAME_MODEL, SMALL, "both"))


@dataclass(slots=True)
class Round:
    """One quiet stretch and the rollout after it; times by the monotonic clock."""

    variant: Variant
    version: int
    quiet: tuple[Usage, Usage]
    loading: tuple[Usage, Usage]
    gates: list[tuple[str, float, float]]
    """Each gate's name, start and end."""
    first_ms: float = 0.0
    """The first call on the new version."""
    later_ms: list[float] = field(default_factory=list[float])
    """Calls on it after that."""

    def others(self) -> float:
        """Returns how many cores others kept busy, in the worse of both stretches."""
        return max(before.others(after) for before, after in (self.quiet, self.loading))


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that is there while it runs."""

    registry: Registry
    server: Server
    caller: Caller
    client: Client
    sources: Path
    """The folder of the models."""
    options: argparse.Namespace

    def round(self, variant: Variant) -> Round:
        """Measures a quiet stretch and a rollout."""
        version = publish(self.registry, variant.model, self.sources / variant.source)
        if not machine.wait_quiet(self.options.others, _QUIET_S):
            say("other processes keep the machine busy: the figures will not be good")
        say(f"{variant.name}: {self.options.seconds:g} s without a rollout")
        quiet = Usage.now()
        time.sleep(self.options.seconds)
        before = Usage.now()
        say(f"{variant.name}: version {version} is rolled out")
        self.registry.start_rollout(variant.model, version)
        wait_in_charge(self.registry, variant.model, version, self._check)
        result = Round(variant, version, (quiet, before), (before, before), [])
        self._call(result)
        result.loading = (before, Usage.now())
        self._call_later(result)
        result.gates = gates(self.registry, variant.model, version)
        took_s = result.loading[1].at_s - before.at_s
        say(f"{variant.name}: it took {took_s:.1f} s; others had {result.others():.2f} cores")
        self._settle(variant.model)
        return result

    def _check(self) -> None:
        self.server.alive()
        self.caller.check()

    def _call(self, result: Round) -> None:
        """Makes the first call on another model; the same model's is among the caller's."""
        if result.variant.model == RESNET:
            result.first_ms = self._resnet_ms(result.version)

    def _call_later(self, result: Round) -> None:
        if result.variant.model == RESNET:
            result.later_ms = [self._resnet_ms(result.version) for _ in range(LATER_CALLS)]

    def _resnet_ms(self, version: int) -> float:
        image = np.zeros((1, *models.LARGE_IMAGE), np.uint8)
        started = time.monotonic()
        answer = self.client.predict(RESNET, {"images": image})
        took_s = time.monotonic() - started
        if answer.version != version:
            sys.exit(f"error: version {answer.version} answered, and version {version} is in charge")
        return took_s * 1e3

    def _settle(self, model: str) -> None:
        wait_for(lambda: self.registry.state(model).rollout is None, "the rollout to end", self._check, _LOAD_S)
        self.server.wait_engines(len(MODELS), self._check)


def wait_in_charge(registry: Registry, model: str, version: int, check: Callable[[], None]) -> None:
    """Returns once a version is in charge; ends the benchmark if it is rejected.

    Asks the journal, and not the server, which has calls to answer.
    """

    def in_charge() -> bool:
        if rejection := registry.state(model).rejected.get(version):
            sys.exit(f"error: version {version} of {model} was rejected: {rejection.reason}")
        return any((e.action, e.version) == ("serving", version) for e in registry.journal(model))

    wait_for(in_charge, f"{model}@{version} to be in charge", check, _LOAD_S)


def publish(registry: Registry, model: str, source: Path) -> int:
    """Publishes a version that waits to be rolled out by name."""
    return registry.publish(model, source / "saved_model", golden=models.golden(source)).version


def gates(registry: Registry, model: str, version: int) -> list[tuple[str, float, float]]:
    """Returns when each gate began and ended, from how long each took, counted back from when the journal says it."""
    found = [e for e in registry.journal(model) if e.version == version and isinstance(e.details.get("gates"), list)]
    if not found:
        return []
    last = max(found, key=lambda entry: len(_gates(entry.details)))
    end = last.time.timestamp() - time.time() + time.monotonic()
    stretches: list[tuple[str, float, float]] = []
    for gate in reversed(_gates(last.details)):
        start = end - float(gate["seconds"])
        stretches.insert(0, (str(gate["gate"]), start, end))
        end = start
    return stretches


def _gates(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(details["gates"])


def request() -> bytes:
    """Returns the message of a small call."""
    image = np.random.default_rng(1).integers(0, 256, (1, *models.IMAGE)).astype(np.uint8)
    return pb.PredictRequest(model=SMALL, inputs=[encode("images", image)]).SerializeToString()


def run(folder: Path, options: argparse.Namespace) -> tuple[list[Round], Calls]:
    """Measures all rounds, and more where others disturbed some; returns them and the caller's calls."""
    sources = models.made(options.models or folder / "models", quick=options.quick)
    registry = Registry(folder / "registry")
    for model in MODELS:
        version = publish(registry, model, sources / model)
        registry.set_policy(model, RolloutPolicy(strategy=(Strategy.MANUAL,), watch_s=0.0, keep_warm_s=0.0))
        registry.start_rollout(model, version)
    arguments = ["--threads", str(options.threads)] if options.threads else []
    with serving(registry.root, folder, *arguments) as server, Client(server.address) as client:
        for model in MODELS:
            wait_in_charge(registry, model, 1, server.alive)
        with Caller(server.address, request(), folder / "caller", controls=True) as caller:
            bench = Bench(registry, server, caller, client, sources, options)
            rounds = [one for variant in VARIANTS for one in undisturbed(bench, variant)]
            calls = caller.stop()
    for one in rounds:
        if one.variant.model == SMALL:
            add_small_calls(one, calls)
    return rounds, calls


def undisturbed(bench: Bench, variant: Variant) -> list[Round]:
    """Returns as many rounds as are wanted, without those in which others used the machine if enough are left."""
    wanted, limit = bench.options.rounds, bench.options.others
    rounds = [bench.round(variant) for _ in range(wanted)]
    while sum(one.others() <= limit for one in rounds) < wanted and len(rounds) < 2 * wanted:
        rounds.append(bench.round(variant))
    return sorted(rounds, key=Round.others)[:wanted]


def add_small_calls(one: Round, calls: Calls) -> None:
    """Finds the first calls on a version of the small model among the caller's."""
    took = calls.took_ms[calls.version == one.version][: SMALL_LATER_CALLS + 1]
    one.first_ms, one.later_ms = float(took[0]), took[1:].tolist()


def summary(one: Round, calls: Calls) -> dict[str, Any]:
    """Returns a round's figures."""
    quiet, loading = (calls.between(before.at_s, after.at_s) for before, after in (one.quiet, one.loading))
    before, during = stretch(quiet, one.quiet), stretch(loading, one.loading)
    return {
        "variant": one.variant.name,
        "version": one.version,
        "quiet": before,
        "loading": during,
        "ratio": figures.ratios(during["call_ms"], before["call_ms"]),
        "ping_ratio": figures.ratios(during["ping_ms"], before["ping_ms"]),
        "spin_ratio": figures.ratios(during["spin_ms"], before["spin_ms"]),
        "first_call_ms": round(one.first_ms, 3),
        "later_calls_ms": figures.percentiles(np.array(one.later_ms)),
        "gates": [
            {"gate": name, "seconds": round(end - start, 3)} | figures.percentiles(calls.between(start, end).took_ms)
            for name, start, end in one.gates
        ],
    }


def stretch(calls: Calls, usage: tuple[Usage, Usage]) -> dict[str, Any]:
    """Returns the figures of one stretch of time."""
    before, after = usage
    return {
        "seconds": round(after.at_s - before.at_s, 3),
        "calls": len(calls.took_ms),
        "failed": int((calls.version == 0).sum()),
        "call_ms": figures.percentiles(calls.took_ms),
        "ping_ms": figures.percentiles(calls.ping_ms),
        "spin_ms": figures.percentiles(calls.spin_ms),
        "our_cores": round(before.ours(after), 3),
        "others_cores": round(before.others(after), 3),
        "stolen_cores": round(before.stolen(after), 4),
    }


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints what was found."""
    table = Table(title=f"medians of {options.rounds} rounds (lowest to highest)")
    for heading in ("", *(variant.name for variant in VARIANTS)):
        table.add_column(heading)
    lines: dict[str, tuple[int, tuple[str, ...]]] = {
        "seconds without a rollout": (1, ("quiet", "seconds")),
        "seconds of the rollout": (1, ("loading", "seconds")),
        "p50 without, ms": (3, ("quiet", "call_ms", "p50")),
        "p99 without, ms": (3, ("quiet", "call_ms", "p99")),
        "p99 meanwhile, ms": (3, ("loading", "call_ms", "p99")),
        "p50, ratio": (3, ("ratio", "p50")),
        "p99, ratio": (3, ("ratio", "p99")),
        "p99.9, ratio": (3, ("ratio", "p99.9")),
        "longest, ratio": (3, ("ratio", "max")),
        "longest meanwhile, ms": (2, ("loading", "call_ms", "max")),
        "failed calls": (0, ("loading", "failed")),
        "a byte to a process and back: p99, ratio": (3, ("ping_ratio", "p99")),
        "a fixed loop: p50, ratio": (3, ("spin_ratio", "p50")),
        "a fixed loop: p99, ratio": (3, ("spin_ratio", "p99")),
        "first call on the new version, ms": (2, ("first_call_ms",)),
        "later calls, p50, ms": (2, ("later_calls_ms", "p50")),
        "later calls, p99, ms": (2, ("later_calls_ms", "p99")),
        "cores that others kept busy, without": (3, ("quiet", "others_cores")),
        "cores that others kept busy, meanwhile": (3, ("loading", "others_cores")),
    }
    for title, (digits, path) in lines.items():
        cells = [figures.spread(figures.at(_of(rows, variant), *path), digits) for variant in VARIANTS]
        table.add_row(title, *cells)
    Console(width=120).print(table)
    report_gates(rows)


def report_gates(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the calls' p99 while each gate was passed."""
    table = Table(title="calls while each gate was passed: medians")
    for heading in ("gate", *(f"{variant.name}: {what}" for variant in VARIANTS for what in ("seconds", "p99, ratio"))):
        table.add_column(heading)
    for name in dict.fromkeys(gate["gate"] for row in rows for gate in row["gates"]):
        cells: list[str] = []
        for variant in VARIANTS:
            pairs = [(gate, row) for row in _of(rows, variant) for gate in row["gates"] if gate["gate"] == name]
            cells.append(figures.median_text([gate["seconds"] for gate, _ in pairs]))
            ratios = [figures.ratios(gate, row["quiet"]["call_ms"]) for gate, row in pairs]
            cells.append(figures.median_text(figures.at(ratios, "p99")))
        table.add_row(name, *cells)
    Console(width=120).print(table)


def _of(rows: Sequence[dict[str, Any]], variant: Variant) -> list[dict[str, Any]]:
    return [row for row in rows if row["variant"] == variant.name]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="python -m bench loading", description="Measure calls beside a rollout.")
    parser.add_argument("--rounds", type=int, default=5, help="rollouts of each kind (default 5)")
    parser.add_argument("--seconds", type=float, default=60.0, help="without a rollout before each (default 60)")
    parser.add_argument("--threads", type=int, default=0, help="threads per operation of an engine (default: its own)")
    parser.add_argument(
        "--others", type=float, default=0.05, help="cores that others may use before a round is repeated (default 0.05)"
    )
    parser.add_argument("--json", type=Path, default=Path("build/bench/loading.json"), help="where figures go")
    parser.add_argument("--models", type=Path, help="keep the models in this folder, and take them if they are there")
    parser.add_argument("--quick", action="store_true", help="one short round with a small model: shows that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds, options.others = 1, 2.0, float("inf")
    return options


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        rounds, calls = run(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = [summary(one, calls) for one in rounds]
    about = machine.describe()
    document = {"benchmark": "loading", "machine": about, "signature": DEFAULT_SIGNATURE, "rounds": rows}
    figures.write(options.json, document)
    report(rows, options)
    print(f"{about['text']}; one caller on a Unix socket shares it; all figures are in {options.json}")
