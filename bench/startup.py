"""``python -m bench startup``: how soon ``modelport serve`` answers its first call, and how much memory it takes.

The classic MNIST network lies in a registry as its only version. A server is started again and again, with each
engine in turns; from before the start a caller (``bench/caller.py``, which writes HTTP/2 frames to a Unix
socket and sleeps in between) tries to connect and then to call every 10 ms. Measured is from just before the process is
made to when it listens, and to its first answer. Where the time goes comes from the journal, which has the
seconds of each gate. Memory is looked at when the server has answered for a few seconds and has nothing to do.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from bench import figures, machine, models
from bench.caller import CallerError, Connection
from bench.loading import gates
from bench.machine import Usage
from bench.stage import START_S, modelport, say
from modelport.tensors import encode
from modelport.v1 import prediction_pb2 as pb
from modelport_registry import Registry

ENGINES = ("openvino", "tensorflow", "auto")
MODEL = models.CLASSIC
_RETRY_S = 0.01
_ROWS = (1, 2, 8, 16)
"""Of the calls that are made before memory is looked at."""
_CALLS = 200
_QUIET_S = 600.0
_MIB = 1 << 20
_PROCESSES = {"engines.worker": "engine", "engines.zygote": "zygote"}


@dataclass(frozen=True, slots=True)
class Start:
    """When a server did what, by the monotonic clock."""

    began_s: float
    listening_s: float
    answered_s: float

    def after_s(self, moment_s: float) -> float:
        """Returns how long after the start a moment was."""
        return round(moment_s - self.began_s, 3)


class Starts:
    """Starts servers on a registry, one after another.

    Args:
        folder: for files.
        registry: holds the model.
        options: the command line's.
    """

    def __init__(self, folder: Path, registry: Registry, options: argparse.Namespace) -> None:
        self._folder = folder
        self._registry = registry
        self._options = options

    def measure(self, engine: str) -> dict[str, Any]:
        """Starts a server, measures it, and ends it; returns its figures."""
        if not machine.wait_quiet(self._options.others, _QUIET_S):
            say("other processes keep the machine busy: the figures will not be good")
        address, log = f"unix:{self._folder}/socket", self._folder / "log"
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)
        command = modelport("serve", "--registry", self._registry.root, "--address", address, "--engine", engine)
        before = Usage.now()
        with log.open("wb") as output:
            began_s = time.monotonic()
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            start = first_answer(address, process, began_s)
            usage = Usage.now()
            row: dict[str, Any] = {
                "engine": engine,
                "listening_s": start.after_s(start.listening_s),
                "answered_s": start.after_s(start.answered_s),
                "our_cores": round(before.ours(usage), 3),
                "others_cores": round(before.others(usage), 3),
                "stolen_cores": round(before.stolen(usage), 4),
            }
            row["gates"] = [
                {"gate": name, "began_s": start.after_s(gate_began_s), "seconds": round(ended_s - gate_began_s, 3)}
                for name, gate_began_s, ended_s in gates(self._registry, MODEL, 1)
            ]
            self._call(address)
            time.sleep(self._options.settle)
            row["memory_mib"] = memory(process.pid)
        except (CallerError, TimeoutError) as error:
            sys.exit(f"error: {error}: {log.read_text()[-2000:]}")
        finally:
            process.terminate()
            process.wait()
        say(f"{engine}: answered after {row['answered_s']:.2f} s")
        return row

    def _call(self, address: str) -> None:
        """Makes some calls, as a server has when its memory counts."""
        for rows in _ROWS:
            connection = Connection(address, request(rows))
            for _ in range(_CALLS):
                if not call(connection):
                    raise CallerError("a call failed")
            connection.socket.close()


def first_answer(address: str, process: subprocess.Popen[bytes], began_s: float) -> Start:
    """Tries to connect, then to call, until a call is answered.

    Raises:
        CallerError: if the server ends.
        TimeoutError: if there is no answer for two minutes.
    """
    connection: Connection | None = None
    message, listening_s = request(1), 0.0
    while time.monotonic() < began_s + START_S:
        if process.poll() is not None:
            raise CallerError("the server ended")
        if connection is None:
            try:
                connection = Connection(address, message)
                listening_s = time.monotonic()
            except OSError:
                time.sleep(_RETRY_S)
                continue
        if call(connection):
            answered_s = time.monotonic()
            connection.socket.close()
            return Start(began_s, listening_s, answered_s)
        time.sleep(_RETRY_S)
    raise TimeoutError("no call was answered")


def call(connection: Connection) -> bool:
    """Makes a call; returns whether a version answered."""
    connection.send()
    while not connection.receive():
        pass
    return connection.version() > 0


def request(rows: int) -> bytes:
    """Returns the message of a call."""
    images = np.random.default_rng(rows).integers(0, 256, (rows, *models.IMAGE)).astype(np.uint8)
    return pb.PredictRequest(model=MODEL, inputs=[encode("images", images)]).SerializeToString()


def memory(front: int) -> dict[str, dict[str, float]]:
    """Returns the resident and proportional memory of a server's processes in MiB, by what they are."""
    found: dict[str, dict[str, float]] = {}
    for process in (parent := psutil.Process(front), *parent.children(recursive=True)):
        line = " ".join(process.cmdline())
        kind = next((kind for module, kind in _PROCESSES.items() if module in line), "front")
        info = process.memory_full_info()
        for name, value in (("rss", info.rss), ("pss", info.pss), ("uss", info.uss)):
            place = found.setdefault(kind, {})
            place[name] = round(place.get(name, 0.0) + value / _MIB, 1)
    found["all"] = {name: round(sum(one[name] for one in found.values()), 1) for name in ("rss", "pss", "uss")}
    return found


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints what was found."""
    table = Table(title=f"medians of {options.rounds} starts (lowest to highest)")
    for heading in ("", *options.engines):
        table.add_column(heading)
    found = [[row for row in rows if row["engine"] == engine] for engine in options.engines]

    def line(title: str, values: Callable[[dict[str, Any]], list[float]], digits: int = 2) -> None:
        table.add_row(title, *(figures.spread([v for row in some for v in values(row)], digits) for some in found))

    line("listens after, s", lambda row: [row["listening_s"]])
    line("first answer after, s", lambda row: [row["answered_s"]])
    for name in dict.fromkeys(gate["gate"] for row in rows for gate in row["gates"]):
        line(f"{name} begins after, s", partial(_of_gate, name, "began_s"))
        line(f"{name} takes, s", partial(_of_gate, name, "seconds"))
    for kind in ("front", "engine", "zygote", "all"):
        line(f"{kind}, RSS, MiB", partial(_of_memory, kind, "rss"), 0)
        line(f"{kind}, PSS, MiB", partial(_of_memory, kind, "pss"), 0)
    line("cores that the server and its caller kept busy", lambda row: [row["our_cores"]])
    line("cores that others kept busy", lambda row: [row["others_cores"]])
    Console(width=140).print(table)


def _of_gate(name: str, what: str, row: dict[str, Any]) -> list[float]:
    return [gate[what] for gate in row["gates"] if gate["gate"] == name]


def _of_memory(kind: str, what: str, row: dict[str, Any]) -> list[float]:
    return [row["memory_mib"][kind][what]] if kind in row["memory_mib"] else []


def run(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all rounds; returns a row for each start."""
    made = models.classic(options.models or folder / "models")
    registry = Registry(folder / "registry")
    rows: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for engine in options.engines:
            shutil.rmtree(registry.root, ignore_errors=True)
            registry.publish(MODEL, made / "saved_model", golden=models.golden(made))
            rows.append(Starts(folder, registry, options).measure(engine))
    return rows


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="python -m bench startup", description="Measure starts and memory.")
    parser.add_argument("--rounds", type=int, default=5, help="starts with each engine (default 5)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--settle", type=float, default=3.0, help="seconds until memory is looked at (default 3)")
    parser.add_argument(
        "--others", type=float, default=0.1, help="cores that others may use before a start (default 0.1)"
    )
    parser.add_argument("--models", type=Path, help="keep the model in this folder, and take it if it is there")
    parser.add_argument("--json", type=Path, default=Path("build/bench/startup.json"), help="where figures go")
    parser.add_argument("--quick", action="store_true", help="one start with each engine: shows that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.settle, options.others = 1, 0.0, float("inf")
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
    figures.write(options.json, {"benchmark": "startup", "machine": about, "rounds": rows})
    report(rows, options)
    print(f"{about['text']}; one caller on a Unix socket shares it; all figures are in {options.json}")
