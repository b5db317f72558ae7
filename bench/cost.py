"""``python -m bench cost``: the processor time that a message takes, by process and thread, and a picture of where.

The classic network is served and called by ``loadgen`` in a closed loop. With ``--flame`` py-spy, which has to be
installed, samples the front meanwhile, and its flame graph is written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench import figures, machine, models
from bench.peers import CASES, Case, build_loadgen
from bench.scaling import MODEL, Stage, serving
from bench.stage import say
from modelport_registry import Registry
from tests.support.rpc import engines

_SETTLE_S = 1.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_FLAME_CASE = "1 row, 64 at a time"
_FLAME_S = 10.0
_FLAME_HZ = 200


@dataclass(frozen=True, slots=True)
class Spent:
    """Processor time in seconds, by who spent it."""

    loop: float
    """The front's event loop."""
    threads: float
    """The front's other threads."""
    engine: float

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.loop - other.loop, self.threads - other.threads, self.engine - other.engine)


def spent(front: psutil.Process) -> Spent:
    """Returns what a server's processes have spent so far."""
    whole = sum(front.cpu_times()[:2])
    fields = Path(f"/proc/{front.pid}/task/{front.pid}/stat").read_text().rpartition(")")[2].split()
    loop = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S  # utime and stime, see proc(5)
    return Spent(loop, whole - loop, sum(sum(one.cpu_times()[:2]) for one in engines(front)))


def measure(stage: Stage, case: Case, seconds: float) -> dict[str, Any]:
    """Returns what a message of a case costs, in microseconds of processor time, by who spends it."""
    stage.measure(MODEL, case.rows, _SETTLE_S, case.concurrency, window=case.window)
    before, driver_before = spent(stage.front), os.times()
    result = stage.measure(MODEL, case.rows, seconds, case.concurrency, window=case.window)
    used, driver_after = spent(stage.front) - before, os.times()
    messages = result["per_s"] * (driver_after.elapsed - driver_before.elapsed)
    driver = sum(driver_after[2:4]) - sum(driver_before[2:4])
    parts = {"loop": used.loop, "threads": used.threads, "engine": used.engine, "driver": driver}
    return {"case": case.name} | result | {"us": {name: s / messages * 1e6 for name, s in parts.items()}}


def profiler() -> str:
    """Returns where py-spy is: beside the Python that runs this, or else on the path."""
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if program is None:
        sys.exit("error: py-spy is not installed: pip install py-spy")
    return program


def draw(stage: Stage, program: str, path: Path) -> None:
    """Writes a flame graph of the front while it answers single rows."""
    case = next(case for case in CASES if case.name == _FLAME_CASE)
    say(f"sampling the front for {_FLAME_S:.0f} s")
    path.parent.mkdir(parents=True, exist_ok=True)
    load = stage.command(MODEL, case.rows, _FLAME_S + 2, case.concurrency)
    with subprocess.Popen(load, stdout=subprocess.DEVNULL):
        time.sleep(1)
        options = ["--duration", f"{_FLAME_S:.0f}", "--rate", str(_FLAME_HZ), "--pid", str(stage.front.pid)]
        done = subprocess.run(
            [program, "record", *options, "--output", str(path)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(f"error: py-spy failed: {done.stderr[-500:]}")


def report(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Prints medians."""
    table = Table(title=f"microseconds of processor time a message: medians of {options.rounds} rounds")
    heads = ("", "messages/s", "front: event loop", "front: other threads", "engine process", "driver")
    for head in heads:
        table.add_column(head)
    for case in CASES:
        found = [row for row in rows if row["case"] == case.name]
        parts = [figures.spread(figures.at(found, "us", name), 0) for name in ("loop", "threads", "engine", "driver")]
        table.add_row(case.name, figures.spread(figures.at(found, "per_s"), 0), *parts)
    Console(width=160).print(table)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="python -m bench cost", description="Measure what a message costs.")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement (default 3)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement (default 3)")
    parser.add_argument("--engine", choices=("openvino", "tensorflow"), default="openvino")
    parser.add_argument("--flame", type=Path, help="write a flame graph (SVG) of the front here; wants py-spy")
    parser.add_argument("--json", type=Path, default=Path("build/bench/cost.json"), help="where figures go")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    program = profiler() if options.flame is not None else ""
    tools = Path("build/bench/tools").resolve()
    tools.mkdir(parents=True, exist_ok=True)
    loadgen = build_loadgen(tools)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    rows: list[dict[str, Any]] = []
    try:
        classic = models.classic(folder / "models")
        Registry(folder / "registry").publish(MODEL, classic / "saved_model", golden=models.golden(classic))
        with serving(folder / "registry", folder, loadgen, [MODEL], options.engine) as stage:
            for number in range(options.rounds):
                say(f"round {number + 1} of {options.rounds}")
                rows += [{"round": number} | measure(stage, case, options.seconds) for case in CASES]
            if options.flame is not None:
                draw(stage, program, options.flame)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about = machine.describe()
    figures.write(options.json, {"benchmark": "cost", "machine": about, "engine": options.engine, "rows": rows})
    report(rows, options)
    print(f"{about['text']}, shared with the driver; engine {options.engine}")
