"""``python -m bench serving``: what serving costs, beside the same model called in one process.

It trains the digits classifier for an epoch, serves it, and measures in turns, so that what else the machine
does hits all of them alike: single rows through the SDK, rows through a stream, and the model itself
in a process without a server. It prints medians over the rounds and the ratios to the model itself.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.stage import START_S, modelport, serving
from modelport import Client
from modelport_server.local import LocalModel, open_local

MODEL = "digits"
CALLERS = 16
MESSAGE_ROWS = 32
IMAGE = (8, 8)


@dataclass(slots=True)
class Measurement:
    """One way to call the model, and how fast it was in each round."""

    name: str
    unit: str
    measure: Callable[[float], float]
    """Takes seconds to go on for, and returns units per second."""
    baseline: str = ""
    """The measurement that it is compared with."""
    rates: list[float] = field(default_factory=list[float])

    @property
    def median(self) -> float:
        """The median rate."""
        return statistics.median(self.rates)


def rate(call: Callable[[], int], duration_s: float) -> float:
    """Returns how many units per second ``call``, which returns what it did, does one after another."""
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < duration_s:
        done += call()
    return done / elapsed


def measurements(client: Client, local: LocalModel, images: NDArray[np.uint8]) -> list[Measurement]:
    """Returns what is measured: the model itself first, then the ways through the server."""
    one, message = {"images": images[:1]}, {"images": images[:MESSAGE_ROWS]}
    batches = [{"images": images[:MESSAGE_ROWS]}] * 64

    def single() -> int:
        return len(client.predict(MODEL, one)["classes"])

    def caller(duration_s: float) -> float:
        return rate(single, duration_s)

    def many(duration_s: float) -> float:
        with ThreadPoolExecutor(CALLERS) as pool:
            return sum(pool.map(caller, [duration_s] * CALLERS))

    def stream() -> int:
        return sum(len(result.prediction["classes"]) for result in client.predict_stream(MODEL, batches))

    return [
        Measurement("in process, 1 row", "calls/s", lambda s: rate(lambda: len(local.predict(one)["classes"]), s)),
        Measurement(
            "served, 1 row, 1 caller",
            "calls/s",
            caller,
            "in process, 1 row",
        ),
        Measurement(f"served, 1 row, {CALLERS} callers", "calls/s", many, "in process, 1 row"),
        Measurement(
            f"in process, {MESSAGE_ROWS} rows",
            "rows/s",
            lambda s: rate(lambda: len(local.predict(message)["classes"]), s),
        ),
        Measurement(
            f"served, stream of {MESSAGE_ROWS} rows",
            "rows/s",
            lambda s: rate(stream, s),
            f"in process, {MESSAGE_ROWS} rows",
        ),
    ]


def report(measured: Sequence[Measurement], rounds: int, duration_s: float) -> None:
    """Prints medians, spreads and ratios."""
    by_name = {measurement.name: measurement for measurement in measured}
    table = Table(title=f"median of {rounds} rounds of {duration_s:g} s, in turns")
    for heading in ("", "median", "lowest to highest", "of the model itself"):
        table.add_column(heading, justify="left" if not heading else "right")
    for one in measured:
        base = by_name.get(one.baseline)
        ratios = [mine / theirs for mine, theirs in zip(one.rates, base.rates, strict=True)] if base else []
        table.add_row(
            one.name,
            f"{one.median:,.0f} {one.unit}",
            f"{min(one.rates):,.0f} to {max(one.rates):,.0f}",
            f"{statistics.median(ratios):.2f}" if ratios else "",
        )
    Console().print(table)
    print(f"{machine.describe()['text']}; client and server share them")


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m bench serving", description="Measure serving beside the model itself."
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each time (default 2)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        registry = folder / "registry"
        print("bench: training the digits classifier for one epoch", file=sys.stderr)
        train = modelport(
            "train", "--data", "digits", "--epochs", "1", "--registry", registry, "--run-dir", folder / "run"
        )
        trained = subprocess.run(train, capture_output=True, text=True, check=False)
        if trained.returncode:
            sys.exit(trained.stderr[-2000:])
        images = np.random.default_rng(0).integers(0, 17, (MESSAGE_ROWS, *IMAGE)).astype(np.uint8)
        measure(registry, folder, images, options.rounds, options.seconds)


def measure(registry: Path, folder: Path, images: NDArray[np.uint8], rounds: int, duration_s: float) -> None:
    """Measures everything in turns, a round to warm up first."""
    with open_local(registry, MODEL) as local, serving(registry, folder) as server, Client(server.address) as client:
        client.wait_ready(model=MODEL, timeout_s=START_S)
        measured = measurements(client, local, images)
        for number in range(rounds + 1):
            print(f"bench: round {number} of {rounds}" if number else "bench: warming up", file=sys.stderr)
            for one in measured:
                found = one.measure(duration_s if number else 0.5)
                if number:
                    one.rates.append(found)
    report(measured, rounds, duration_s)
